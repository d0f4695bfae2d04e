// What the CUDA kernels look like from the host: plain pointers, sizes and numbers; no torch and no CUDA header.
//
// Every function queues its kernels on a stream and returns; none allocates, synchronises or reads device memory, so
// all can be captured in a CUDA graph. They throw std::runtime_error with CUDA's message if a kernel cannot be
// launched. Pointers point to device memory. Scalars of type void* have the accumulation dtype of the tensors' dtype.

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "../dtype.h"
#include "../step_arguments.h"

struct CUstream_st;

namespace gam_fused::cuda {

using Stream = CUstream_st*;  // cudaStream_t by its own name

// Where to run: the stream's device has this many multiprocessors.
struct Target {
    Stream stream;
    int multiprocessors;
};

// The addresses of a list's tensors. Which elements they have, the lists of one launch share:
using Addresses = std::vector<void*>;

struct Elements {
    Dtype dtype;
    const std::vector<int64_t>& numels;
};

// ---------------------------------------------------------------- norm

// Bytes of device memory, aligned to 16, that l2_norms needs for intermediate results.
size_t l2_norm_scratch_bytes(const Elements& elements);

// The norms of one list of tensors or, when `results` has two, of the first `first_list` tensors and of the others.
void l2_norms(const Target& target, const Elements& elements, const Addresses& tensors, size_t first_list,
              void* scratch, const std::vector<void*>& results);

// The norm of ends − starts; `scratch` as for l2_norms.
void l2_norm_of_difference(const Target& target, const Elements& elements, const Addresses& ends,
                           const Addresses& starts, void* scratch, void* result);

// ---------------------------------------------------------------- perturb, shift, restore, combine

void perturb(const Target& target, const Elements& elements, const Addresses& params, const Addresses& directions,
             const void* direction_norm, const void* grad_norm, double rho, double xi,
             const std::optional<uint64_t>& rounding_seed);

// `origins` and `starts` are empty where they are left out.
void shift(const Target& target, const Elements& elements, const Addresses& params, const Addresses& origins,
           const Addresses& ends, const Addresses& starts, const void* norm, double rho, double xi,
           const std::optional<uint64_t>& rounding_seed);

void restore(const Target& target, const Elements& elements, const Addresses& params, const Addresses& backups);

// The lists that every launch after the adversarial point works on.
struct Restored {
    const Addresses& params;
    const Addresses& backups;
    const Addresses& grads;
    const Addresses& hvps;
};

void combine(const Target& target, const Elements& elements, const Restored& lists, const Penalty& penalty);

// ---------------------------------------------------------------- decompose

// The gradients of an accelerated step.
struct Gradients {
    const Addresses& grads;
    const Addresses& grads_ahead;
    const Addresses& adversarial_grads;
    const Addresses& adversarial_grads_ahead;
};

struct ProjectionResults {
    void* projection;
    void* plus_norm;
    void* minus_norm;
};

// Bytes of device memory, aligned to 16, that projection needs for intermediate results.
size_t projection_scratch_bytes(const Elements& elements);

void projection(const Target& target, const Elements& elements, const Gradients& lists, const Weights<double>& weights,
                void* scratch, const ProjectionResults& results);

void decompose(const Target& target, const Elements& elements, const Gradients& lists,
               const Decomposition& decomposition);

// ---------------------------------------------------------------- fused steps

// Of one step; more raise.
constexpr int kMaxGuards = 16;

// `momentum_buffers` is empty where momentum is 0.
void sgd_step(const Target& target, const Elements& elements, const Restored& lists, const Addresses& momentum_buffers,
              const StepArguments& step, const SGDArguments& sgd);

// `max_exp_avg_sqs` is empty where `amsgrad` is off.
struct AdamWState {
    const Addresses& exp_avgs;
    const Addresses& exp_avg_sqs;
    const Addresses& max_exp_avg_sqs;
    const Addresses& state_steps;  // one float32 each, also for tensors without elements
};

void adamw_step(const Target& target, const Elements& elements, const Restored& lists, const AdamWState& state,
                const StepArguments& step, const AdamWArguments& adamw);

}  // namespace gam_fused::cuda
