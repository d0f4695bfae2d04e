// The operators under torch.ops.gam_fused, as PyTorch sees them. `(a!)` marks what an operator writes.
//
// Lists hold tensors of one dtype and device; index i of every list belongs to one parameter. Norms are 0-d, of the
// accumulation dtype, on the tensors' device. Everything is checked before the first byte is written (operands.h).

#pragma once

namespace gam_fused::schemas {

// Global 2-norm; deterministic, whatever the number of threads or multiprocessors.
constexpr const char* l2_norm = "l2_norm(Tensor[] tensors) -> Tensor";

// The norms of two lists of one dtype and device in one launch.
constexpr const char* l2_norm_pair = "l2_norm_pair(Tensor[] first, Tensor[] second) -> (Tensor, Tensor)";

// The norm of ends − starts, taken in the accumulation type; as l2_norm.
constexpr const char* difference_norm = "difference_norm(Tensor[] ends, Tensor[] starts) -> Tensor";

// params <- θ + ρ u / (‖u‖ + ξ (‖g‖ + ξ)), directions <- θ. Where a norm or the quotient is not finite, params stay.
// With `rounding_seed`, here and below, bfloat16 and float16 params are rounded stochastically (rounding.h).
constexpr const char* perturb_ =
    "perturb_(Tensor(a!)[] params, Tensor(b!)[] directions, Tensor direction_norm, Tensor grad_norm, float rho, "
    "float xi, *, int? rounding_seed=None) -> ()";

// params <- origins + ρ (ends − starts) / (norm + ξ); `origins` is empty where params move from where they are,
// `starts` where they move along ends. Where the norm or the quotient is not finite, params <- origins.
constexpr const char* shift_ =
    "shift_(Tensor(a!)[] params, Tensor[] origins, Tensor[] ends, Tensor[] starts, Tensor norm, float rho, float xi, "
    "*, int? rounding_seed=None) -> ()";

// params <- backups
constexpr const char* restore_ = "restore_(Tensor(a!)[] params, Tensor[] backups) -> ()";

// params <- backups, grads <- g + α ρ / (‖g_adv‖ + ξ) · hvp
constexpr const char* combine_ =
    "combine_(Tensor(a!)[] params, Tensor[] backups, Tensor(b!)[] grads, Tensor[] hvps, Tensor adversarial_norm, "
    "float rho, float alpha, float xi) -> ()";

// With h⁺ = weight1 · grads_ahead + weight3 · adversarial_grads_ahead and h⁻ = weight0 · grads + weight2 ·
// adversarial_grads: ⟨h⁻, h⁺⟩ / ‖h⁺‖ (0 where h⁺ is 0), ‖h⁺‖ and ‖h⁻‖; deterministic as the norms are.
constexpr const char* projection =
    "projection(Tensor[] grads, Tensor[] grads_ahead, Tensor[] adversarial_grads, Tensor[] adversarial_grads_ahead, "
    "float weight0, float weight1, float weight2, float weight3) -> (Tensor, Tensor, Tensor)";

// grads <- h⁺, grads_ahead <- h⁻ − projection · plus_norm / (plus_norm + ξ)² · h⁺
constexpr const char* decompose_ =
    "decompose_(Tensor(a!)[] grads, Tensor(b!)[] grads_ahead, Tensor[] adversarial_grads, "
    "Tensor[] adversarial_grads_ahead, Tensor projection, Tensor plus_norm, float weight0, float weight1, "
    "float weight2, float weight3, float xi) -> ()";

// Restore, combine and torch.optim.SGD in one launch. `momentum_buffers` is empty where momentum is 0. `guards` are
// 0-d tensors like the norms: where one of them or `adversarial_norm` is not finite, or `found_inf` is not zero,
// params <- backups and nothing else is written. The combined gradient is divided by `grad_scale`; it is left in
// `grads` with `write_grads`, and not negated there by `maximize`. `lr_tensor` (0-d, like the norms) takes the place of
// `lr`.
constexpr const char* sgd_step_ =
    "sgd_step_(Tensor(a!)[] params, Tensor[] backups, Tensor(b!)[] grads, Tensor[] hvps, "
    "Tensor(c!)[] momentum_buffers, Tensor adversarial_norm, Tensor[] guards, float rho, float alpha, float xi, *, "
    "float lr, Tensor? lr_tensor=None, float momentum=0., float dampening=0., float weight_decay=0., "
    "bool nesterov=False, bool maximize=False, bool first_step=False, bool write_grads=True, Tensor? grad_scale=None, "
    "Tensor? found_inf=None, int? rounding_seed=None) -> ()";

// The same with torch.optim.Adam or, with `decoupled_weight_decay`, torch.optim.AdamW. `max_exp_avg_sqs` is empty where
// `amsgrad` is off. `state_steps` are float32 0-d tensors on the tensors' device and count up by one.
constexpr const char* adamw_step_ =
    "adamw_step_(Tensor(a!)[] params, Tensor[] backups, Tensor(b!)[] grads, Tensor[] hvps, Tensor(c!)[] exp_avgs, "
    "Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] state_steps, Tensor adversarial_norm, "
    "Tensor[] guards, float rho, float alpha, float xi, *, float lr, Tensor? lr_tensor=None, float beta1=0.9, "
    "float beta2=0.999, float eps=1e-8, float weight_decay=0., bool decoupled_weight_decay=True, bool amsgrad=False, "
    "bool maximize=False, bool write_grads=True, Tensor? grad_scale=None, Tensor? found_inf=None, "
    "int? rounding_seed=None) -> ()";

}  // namespace gam_fused::schemas
