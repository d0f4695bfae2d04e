// The double backward of batch, group, layer and RMS normalization under torch.ops.gam_fused, and its CPU kernels.
//
// How the work is cut depends on sizes alone, and sums of the pieces are added up in their order, so that results do
// not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../cpu/chunk_kernels.h"
#include "../cpu/parallel.h"
#include "norm_kernels.h"
#include "norm_rules.h"
#include "norm_tensors.h"

namespace gam_fused::cpu {

const NormKernels& norm_kernels() {
    static const NormKernels& chosen = []() -> const NormKernels& {
#if defined(__x86_64__)
        const std::string name = chunk_kernels().name;
        if (name == kNormAVX512.name) {
            return kNormAVX512;
        }
        if (name == kNormAVX2.name) {
            return kNormAVX2;
        }
#endif
        return kNormBaseline;
    }();
    return chosen;
}

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor>;

// Of the inputs of one set: what it reads twice then comes from a core's own cache the second time.
constexpr int64_t kCachedBytes = int64_t{1} << 20;
// Shorter runs of one set, with others between them, are better read along with those.
constexpr int64_t kRunBytes = 2048;
constexpr int64_t kSegment = 16384;       // elements of a channel that are a unit of work
constexpr int64_t kRowsElements = 32768;  // about as many elements of several rows are one
// Rows whose shares in the gradient of a weight are added up in the accumulation type, unless there are only so few.
constexpr int64_t kRowsPerTask = 64;
constexpr int64_t kFewTasks = 32;

int64_t ceil_div(int64_t a, int64_t b) {
    return a / b + (a % b != 0);
}

// function(number) for 0, 1, ..., each a piece of work over about so many elements.
template <typename Function>
void for_each(int64_t count, int64_t elements, const Function& function) {
    const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            function(i);
        }
    };
    if (count * elements < 2 * kGrain) {
        run(0, count);
    } else {
        torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements)), run);
    }
}

template <typename T>
T* at(std::vector<T>& values, int64_t index) {
    return values.data() + index;
}

// ---------------------------------------------------------------- a weight for each channel

// Sets that consist of whole channels. A channel of a set has a number: `batch * channels + channel` where each sample
// of the batch has statistics of its own, `channel` where all share theirs. Its elements lie in `outer` runs of
// `inner`.
struct ChannelSets {
    int64_t batches;  // with statistics of their own
    int64_t channels;
    int64_t groups;  // of channels, sets in a batch
    int64_t outer;
    int64_t inner;
    bool has_statistics;  // that depend on the input

    int64_t numbers() const { return batches * channels; }
    int64_t sets() const { return batches * groups; }
    int64_t channels_per_set() const { return channels / groups; }
    int64_t elements_per_set() const { return channels_per_set() * outer * inner; }
};

class ChannelNorm {
 public:
    ChannelNorm(const ChannelSets& sets, const NormInputs& inputs, const NormOutputs& outputs,
                const OptionalTensor& weight, const Tensor& mean, const Tensor& invstd, const OptionalTensor& gg_weight,
                const OptionalTensor& gg_bias)
        : sets_(sets),
          inputs_(inputs),
          outputs_(outputs),
          weight_(numbers("weight", weight, sets.channels, 1)),
          gg_weight_(numbers("gg_weight", gg_weight, sets.channels, 0)),
          gg_bias_(numbers("gg_bias", gg_bias, sets.channels, 0)),
          invstd_(numbers("invstd", invstd, sets.sets(), 0)),
          sums_(static_cast<size_t>(sets.numbers())),
          coefficients_(static_cast<size_t>(sets.numbers())),
          grad_weight_(static_cast<size_t>(sets.numbers())) {
        mean_.reserve(sums_.size());
        for (const double each : numbers("mean", mean, sets.sets(), 0)) {
            mean_.insert(mean_.end(), static_cast<size_t>(sets.channels_per_set()), each);
        }
    }

    // Each channel of a sample is a run.
    void run_contiguous() {
        const int64_t segments = ceil_div(sets_.inner, kSegment);
        const int64_t pieces = sets_.numbers() * sets_.outer * segments;
        std::vector<NormSums> partials(static_cast<size_t>(pieces));
        const auto piece = [&](int64_t number, const auto& function) {
            const int64_t run = number / segments, begin = number % segments * kSegment;
            function(run % sets_.numbers(), run * sets_.inner + begin, std::min(kSegment, sets_.inner - begin));
        };
        const auto sum = [&](int64_t number) {
            piece(number, [&](int64_t channel, int64_t begin, int64_t size) {
                kernels_.plane_sums(inputs_, begin, size, *at(mean_, channel), *at(partials, number));
            });
        };
        const auto write = [&](int64_t number) {
            piece(number, [&](int64_t channel, int64_t begin, int64_t size) {
                kernels_.plane_outputs(inputs_, outputs_, begin, size, *at(mean_, channel),
                                       *at(coefficients_, channel));
            });
        };
        const auto for_pieces_of_set = [&](int64_t set, const auto& function) {
            const int64_t first = set * sets_.channels_per_set();
            for (int64_t outer = 0; outer < sets_.outer; ++outer) {
                for (int64_t channel = first; channel < first + sets_.channels_per_set(); ++channel) {
                    const int64_t begin = (outer * sets_.numbers() + channel) * segments;
                    for (int64_t number = begin; number < begin + segments; ++number) {
                        function(channel, number);
                    }
                }
            }
        };
        const auto conclude = [&](int64_t set) {
            for_pieces_of_set(
                set, [&](int64_t channel, int64_t number) { add(*at(sums_, channel), *at(partials, number)); });
            conclude_set(set);
        };
        const int64_t elements = sets_.elements_per_set();
        const auto element_bytes = static_cast<int64_t>(size_of(inputs_.dtype));
        const bool is_cached = 3 * elements * element_bytes <= kCachedBytes &&
                               (sets_.outer == 1 || sets_.inner * element_bytes >= kRunBytes);
        if (is_cached && sets_.sets() >= int64_t{torch::stable::get_num_threads()}) {
            for_each(sets_.sets(), elements, [&](int64_t set) {
                for_pieces_of_set(set, [&](int64_t, int64_t number) { sum(number); });
                conclude(set);
                for_pieces_of_set(set, [&](int64_t, int64_t number) { write(number); });
            });
        } else {
            const int64_t size = std::min(kSegment, sets_.inner);
            for_each(pieces, size, sum);
            for_each(sets_.sets(), sets_.channels_per_set() * sets_.outer * segments, conclude);
            for_each(pieces, size, write);
        }
    }

    // All channels of one place lie beside each other.
    void run_channels_last() {
        const int64_t rows = sets_.outer * sets_.inner;  // of a batch
        const int64_t rows_per_task = std::max<int64_t>(64, kRowsElements / sets_.channels);
        const int64_t tasks = ceil_div(rows, rows_per_task);  // of a batch
        std::vector<NormSums> partials(static_cast<size_t>(sets_.batches * tasks * sets_.channels));
        const auto task = [&](int64_t number, const auto& function) {
            const int64_t batch = number / tasks, first = number % tasks * rows_per_task;
            function(batch * sets_.channels, (batch * rows + first) * sets_.channels,
                     std::min(rows_per_task, rows - first));
        };
        const int64_t elements = std::min(rows_per_task, rows) * sets_.channels;
        for_each(sets_.batches * tasks, elements, [&](int64_t number) {
            task(number, [&](int64_t channel, int64_t begin, int64_t size) {
                kernels_.channel_sums(inputs_, begin, size, sets_.channels, at(mean_, channel),
                                      at(partials, number * sets_.channels));
            });
        });
        for (int64_t number = 0; number < sets_.batches * tasks; ++number) {
            const int64_t first = number / tasks * sets_.channels;
            for (int64_t channel = 0; channel < sets_.channels; ++channel) {
                add(*at(sums_, first + channel), *at(partials, number * sets_.channels + channel));
            }
        }
        for (int64_t set = 0; set < sets_.sets(); ++set) {
            conclude_set(set);
        }
        for_each(sets_.batches * tasks, elements, [&](int64_t number) {
            task(number, [&](int64_t channel, int64_t begin, int64_t size) {
                kernels_.channel_outputs(inputs_, outputs_, begin, size, sets_.channels, at(mean_, channel),
                                         at(coefficients_, channel));
            });
        });
    }

    // Of the weight of each channel.
    std::vector<double> grad_weight() const {
        std::vector<double> total(static_cast<size_t>(sets_.channels));
        for (size_t i = 0; i < grad_weight_.size(); ++i) {
            total[i % total.size()] += grad_weight_[i];
        }
        return total;
    }

 private:
    static void add(NormSums& sums, const NormSums& more) {
        sums.u += more.u;
        sums.u_d += more.u_d;
        sums.v += more.v;
        sums.v_d += more.v_d;
        sums.v_u += more.v_u;
    }

    void conclude_set(int64_t set) {
        const int64_t channels = sets_.channels_per_set();
        const int64_t first = set * channels, weights = first % sets_.channels;
        const double invstd = *at(invstd_, set);
        if (sets_.has_statistics) {
            norm_coefficients(at(sums_, first), at(weight_, weights), at(gg_weight_, weights), at(gg_bias_, weights),
                              channels, static_cast<double>(sets_.elements_per_set()), invstd, at(coefficients_, first),
                              at(grad_weight_, first));
        } else {
            constant_norm_coefficients(at(sums_, first), at(weight_, weights), at(gg_weight_, weights),
                                       at(gg_bias_, weights), channels, invstd, at(coefficients_, first),
                                       at(grad_weight_, first));
        }
    }

    const ChannelSets sets_;
    const NormInputs inputs_;
    const NormOutputs outputs_;
    const NormKernels& kernels_ = norm_kernels();
    std::vector<double> weight_, gg_weight_, gg_bias_;  // of each channel
    std::vector<double> invstd_;                        // of each set
    // By number of the channel.
    std::vector<double> mean_;
    std::vector<NormSums> sums_;
    std::vector<NormCoefficients> coefficients_;
    std::vector<double> grad_weight_;
};

NormOutputs outputs_in(const Tensor& grad_grad_output, bool is_first_wanted, const Tensor& grad_input,
                       bool is_second_wanted) {
    return {is_first_wanted ? grad_grad_output.mutable_data_ptr() : nullptr,
            is_second_wanted ? grad_input.mutable_data_ptr() : nullptr};
}

Results run(const ChannelSets& sets, const Activations& activations, const Tensor& input, const OptionalTensor& weight,
            const Tensor& mean, const Tensor& invstd, const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
            bool needs_grad_output, bool needs_input, bool needs_weight) {
    Tensor grad_grad_output = activations.new_result(needs_grad_output);
    Tensor grad_input = activations.new_result(needs_input);
    ChannelNorm norm(sets, activations.inputs, outputs_in(grad_grad_output, needs_grad_output, grad_input, needs_input),
                     weight, mean, invstd, gg_weight, gg_bias);
    if (activations.numel() > 0) {
        // Where there is one element to a channel and sample, both hold, and rows are longer.
        if (activations.is_channels_last()) {
            norm.run_channels_last();
        } else if (activations.is_contiguous()) {
            norm.run_contiguous();
        } else {
            fail("input: expected a tensor that is contiguous or channels_last");
        }
    }
    return {grad_grad_output, grad_input, weight_result(weight, input, needs_weight, norm.grad_weight())};
}

int64_t spatial_size(const Activations& activations) {
    if (activations.dim() < 2) {
        fail("input: expected at least 2 dimensions");
    }
    int64_t size = 1;
    for (int64_t i = 2; i < activations.dim(); ++i) {
        size *= activations.size(i);
    }
    return size;
}

Results batch_norm_double_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                   const Tensor& mean, const Tensor& invstd, const OptionalTensor& gg_input,
                                   const OptionalTensor& gg_weight, const OptionalTensor& gg_bias, bool training,
                                   bool needs_grad_output, bool needs_input, bool needs_weight) {
    const Activations activations(grad_output, input, gg_input);
    const int64_t spatial = spatial_size(activations), channels = activations.size(1);
    const ChannelSets sets = {1, channels, std::max<int64_t>(1, channels), activations.size(0), spatial, training};
    return run(sets, activations, input, weight, mean, invstd, gg_weight, gg_bias, needs_grad_output, needs_input,
               needs_weight);
}

Results group_norm_double_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                   const Tensor& mean, const Tensor& invstd, const OptionalTensor& gg_input,
                                   const OptionalTensor& gg_weight, const OptionalTensor& gg_bias, int64_t num_groups,
                                   bool needs_grad_output, bool needs_input, bool needs_weight) {
    const Activations activations(grad_output, input, gg_input);
    const int64_t spatial = spatial_size(activations), channels = activations.size(1);
    if (num_groups < 1 || channels % num_groups != 0) {
        fail("num_groups: ", num_groups, " does not divide the number of channels, ", channels);
    }
    const ChannelSets sets = {activations.size(0), channels, num_groups, 1, spatial, true};
    return run(sets, activations, input, weight, mean, invstd, gg_weight, gg_bias, needs_grad_output, needs_input,
               needs_weight);
}

// ---------------------------------------------------------------- a weight for each element of a row

template <typename A>
std::vector<A> in_accumulation_type(const std::vector<double>& values) {
    std::vector<A> result;
    result.reserve(values.size());
    for (const double value : values) {
        result.push_back(static_cast<A>(value));
    }
    return result;
}

// Returns the gradient of the weight, of `size` elements.
template <typename A>
std::vector<double> run_rows(const NormInputs& inputs, const NormOutputs& outputs, int64_t rows, int64_t size,
                             const double* mean, const double* invstd, const OptionalTensor& weight,
                             const OptionalTensor& gg_weight, const OptionalTensor& gg_bias, bool needs_weight) {
    const std::vector<A> of_weight = in_accumulation_type<A>(numbers("weight", weight, size, 1));
    const std::vector<A> of_gg_weight = in_accumulation_type<A>(numbers("gg_weight", gg_weight, size, 0));
    const std::vector<A> of_gg_bias = in_accumulation_type<A>(numbers("gg_bias", gg_bias, size, 0));
    const LayerWeights weights = {of_weight.data(), gg_weight ? of_gg_weight.data() : nullptr,
                                  gg_bias ? of_gg_bias.data() : nullptr};
    const int64_t rows_per_task = std::min(ceil_div(rows, kFewTasks), kRowsPerTask);
    const int64_t tasks = ceil_div(rows, rows_per_task);
    std::vector<A> partials(static_cast<size_t>(needs_weight ? tasks * size : 0));
    const NormKernels& kernels = norm_kernels();
    for_each(tasks, rows_per_task * size, [&](int64_t task) {
        const int64_t first = task * rows_per_task;
        kernels.layer_rows(inputs, outputs, first * size, std::min(rows_per_task, rows - first), size,
                           mean == nullptr ? nullptr : mean + first, invstd + first, weights,
                           needs_weight ? at(partials, task * size) : nullptr);
    });
    std::vector<double> grad_weight(static_cast<size_t>(needs_weight ? size : 0));
    for (size_t i = 0; i < partials.size(); i += grad_weight.size()) {
        for (size_t j = 0; j < grad_weight.size(); ++j) {
            grad_weight[j] += static_cast<double>(partials[i + j]);
        }
    }
    return grad_weight;
}

Results layer_norm_double_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                   const OptionalTensor& mean, const Tensor& invstd, const OptionalTensor& gg_input,
                                   const OptionalTensor& gg_weight, const OptionalTensor& gg_bias,
                                   int64_t normalized_dims, bool needs_grad_output, bool needs_input,
                                   bool needs_weight) {
    const Activations activations(grad_output, input, gg_input);
    if (normalized_dims < 1 || normalized_dims > activations.dim()) {
        fail("normalized_dims: expected 1 to ", activations.dim(), ", got ", normalized_dims);
    }
    if (!activations.is_contiguous()) {
        fail("input: expected a contiguous tensor");
    }
    int64_t rows = 1, size = 1;
    for (int64_t i = 0; i < activations.dim(); ++i) {
        (i < activations.dim() - normalized_dims ? rows : size) *= activations.size(i);
    }
    Tensor grad_grad_output = activations.new_result(needs_grad_output);
    Tensor grad_input = activations.new_result(needs_input);
    std::vector<double> grad_weight(static_cast<size_t>(needs_weight ? size : 0));
    if (activations.numel() > 0) {
        const NormOutputs outputs = outputs_in(grad_grad_output, needs_grad_output, grad_input, needs_input);
        const std::vector<double> means = numbers("mean", mean, rows, 0), invstds = numbers("invstd", invstd, rows, 0);
        const double* const centers = mean ? means.data() : nullptr;
        const auto with = [&](auto zero) {
            grad_weight = run_rows<decltype(zero)>(activations.inputs, outputs, rows, size, centers, invstds.data(),
                                                   weight, gg_weight, gg_bias, needs_weight);
        };
        activations.inputs.dtype == Dtype::float64 ? with(double{}) : with(float{});
    }
    return {grad_grad_output, grad_input, weight_result(weight, input, needs_weight, grad_weight)};
}

}  // namespace

}  // namespace gam_fused::cpu

// What autograd asks of the double backward: given the double gradients gg_input, gg_weight and gg_bias of
// grad_input, grad_weight and grad_bias, the gradients of grad_output, input and weight. Results not asked for have no
// elements. `mean` and `invstd` are those of the forward pass; layer_norm without `mean` is RMS normalization.
STABLE_TORCH_LIBRARY_FRAGMENT(gam_fused, library) {
    library.def(
        "batch_norm_double_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
        "Tensor? gg_input, Tensor? gg_weight, Tensor? gg_bias, bool training, bool needs_grad_output, "
        "bool needs_input, bool needs_weight) -> (Tensor, Tensor, Tensor)");
    library.def(
        "group_norm_double_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, Tensor invstd, "
        "Tensor? gg_input, Tensor? gg_weight, Tensor? gg_bias, int num_groups, bool needs_grad_output, "
        "bool needs_input, bool needs_weight) -> (Tensor, Tensor, Tensor)");
    library.def(
        "layer_norm_double_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? mean, Tensor invstd, "
        "Tensor? gg_input, Tensor? gg_weight, Tensor? gg_bias, int normalized_dims, bool needs_grad_output, "
        "bool needs_input, bool needs_weight) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gam_fused, CPU, library) {
    using namespace gam_fused;
    using namespace gam_fused::cpu;
    library.impl("batch_norm_double_backward", boxed<&batch_norm_double_backward>);
    library.impl("group_norm_double_backward", boxed<&group_norm_double_backward>);
    library.impl("layer_norm_double_backward", boxed<&layer_norm_double_backward>);
}
