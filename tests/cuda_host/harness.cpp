// Runs one launch function of csrc/cuda/launches.h on the CPU: harness CASE RESULT
//
// CASE holds, in this byte order and without padding: operator, seed of the order of blocks, number of multiprocessors,
// dtype, whether parameters are rounded stochastically, the seed of that, numbers (doubles), sizes of tensors (int64),
// and buffers: how far each is off a 16-byte boundary, and its bytes. Buffers are the tensors of each list in turn,
// then device scalars, an empty one standing for a null pointer. RESULT holds the bytes of all buffers afterwards.
// kernels_on_host.py writes the one and reads the other.

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda_on_host.h"

// csrc is on the include path.
#include "cuda/launches.h"

namespace {

using gam_fused::AdamWArguments;
using gam_fused::Dtype;
using gam_fused::Penalty;
using gam_fused::SGDArguments;
using gam_fused::StepArguments;
using gam_fused::Weights;
using namespace gam_fused::cuda;

// Memory that ends where the data ends, for AddressSanitizer to see the first byte beyond.
class Buffer {
 public:
    Buffer(size_t offset, size_t bytes) : offset_(offset), bytes_(bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, offset + bytes) != 0) {
            throw std::bad_alloc();
        }
        memory_.reset(static_cast<unsigned char*>(memory));
        std::memset(memory, kCanary, offset);
    }

    unsigned char* data() const { return memory_.get() + offset_; }
    size_t bytes() const { return bytes_; }

    void check_canary() const {
        if (std::any_of(memory_.get(), data(), [](unsigned char byte) { return byte != kCanary; })) {
            throw std::runtime_error("written before the beginning of a tensor");
        }
    }

 private:
    struct Free {
        void operator()(unsigned char* memory) const { std::free(memory); }
    };

    static constexpr unsigned char kCanary = 0xa5;
    size_t offset_;
    size_t bytes_;
    std::unique_ptr<unsigned char, Free> memory_;
};

class Reader {
 public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) { file_.exceptions(std::ios::failbit); }

    template <typename T>
    T number() {
        T value;
        file_.read(reinterpret_cast<char*>(&value), sizeof value);
        return value;
    }

    template <typename T>
    std::vector<T> numbers() {
        std::vector<T> values(number<uint64_t>());
        for (T& value : values) {
            value = number<T>();
        }
        return values;
    }

    Buffer buffer() {
        const auto offset = number<uint64_t>();
        const auto bytes = number<uint64_t>();
        Buffer buffer(offset, bytes);
        file_.read(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(bytes));
        return buffer;
    }

 private:
    std::ifstream file_;
};

struct Case {
    explicit Case(Reader reader)
        : name(reader.numbers<char>()),
          seed(reader.number<uint32_t>()),
          target{nullptr, reader.number<int32_t>()},
          dtype(static_cast<Dtype>(reader.number<int32_t>())),
          rounding_seed(optional_seed(reader)),
          numbers(reader.numbers<double>()),
          numels(reader.numbers<int64_t>()) {
        const auto count = reader.number<uint64_t>();
        for (uint64_t i = 0; i < count; ++i) {
            buffers.push_back(reader.buffer());
        }
    }

    static std::optional<uint64_t> optional_seed(Reader& reader) {
        const bool is_given = reader.number<uint8_t>() != 0;
        const auto seed = reader.number<uint64_t>();
        return is_given ? std::optional(seed) : std::nullopt;
    }

    // Arguments in the order in which they were written.
    double number() { return numbers.at(next_number++); }
    bool flag() { return number() != 0; }
    void* scalar() {
        const Buffer& buffer = buffers.at(next_buffer++);
        return buffer.bytes() == 0 ? nullptr : buffer.data();
    }
    std::vector<void*> scalars(size_t count) {
        std::vector<void*> addresses;
        for (size_t i = 0; i < count; ++i) {
            addresses.push_back(scalar());
        }
        return addresses;
    }
    Addresses list() {
        Addresses addresses;
        for (size_t i = 0; i < numels.size(); ++i) {
            addresses.push_back(buffers.at(next_buffer++).data());
        }
        return addresses;
    }
    Addresses list_if(bool is_there) { return is_there ? list() : Addresses(); }

    std::vector<char> name;
    uint32_t seed;
    Target target;
    Dtype dtype;
    std::optional<uint64_t> rounding_seed;
    std::vector<double> numbers;
    std::vector<int64_t> numels;
    std::vector<Buffer> buffers;
    size_t next_number = 0;
    size_t next_buffer = 0;
};

[[maybe_unused]] void run_l2_norms(Case& c) {
    const Elements elements{c.dtype, c.numels};
    const auto first_list = static_cast<size_t>(c.number());
    const Addresses tensors = c.list();
    const std::vector<void*> results = c.scalars(static_cast<size_t>(c.number()));
    const Buffer scratch(0, l2_norm_scratch_bytes(elements));
    std::memset(scratch.data(), 0xff, scratch.bytes());
    l2_norms(c.target, elements, tensors, first_list, scratch.data(), results);
}

[[maybe_unused]] void run_perturb(Case& c) {
    const Addresses params = c.list();
    const Addresses directions = c.list();
    const void* const direction_norm = c.scalar();
    const void* const grad_norm = c.scalar();
    const double rho = c.number();
    const double xi = c.number();
    perturb(c.target, {c.dtype, c.numels}, params, directions, direction_norm, grad_norm, rho, xi, c.rounding_seed);
}

[[maybe_unused]] void run_difference_norm(Case& c) {
    const Elements elements{c.dtype, c.numels};
    const Addresses ends = c.list();
    const Addresses starts = c.list();
    void* const result = c.scalar();
    const Buffer scratch(0, l2_norm_scratch_bytes(elements));
    std::memset(scratch.data(), 0xff, scratch.bytes());
    l2_norm_of_difference(c.target, elements, ends, starts, scratch.data(), result);
}

[[maybe_unused]] void run_shift(Case& c) {
    const bool has_origins = c.flag();
    const bool has_starts = c.flag();
    const Addresses params = c.list();
    const Addresses origins = c.list_if(has_origins);
    const Addresses ends = c.list();
    const Addresses starts = c.list_if(has_starts);
    const void* const norm = c.scalar();
    const double rho = c.number();
    const double xi = c.number();
    shift(c.target, {c.dtype, c.numels}, params, origins, ends, starts, norm, rho, xi, c.rounding_seed);
}

[[maybe_unused]] void run_restore(Case& c) {
    const Addresses params = c.list();
    const Addresses backups = c.list();
    restore(c.target, {c.dtype, c.numels}, params, backups);
}

struct RestoredLists {
    explicit RestoredLists(Case& c) : params(c.list()), backups(c.list()), grads(c.list()), hvps(c.list()) {}
    Restored restored() const { return {params, backups, grads, hvps}; }

    Addresses params, backups, grads, hvps;
};

Penalty read_penalty(Case& c) {
    const double rho = c.number();
    const double alpha = c.number();
    const double xi = c.number();
    return {c.scalar(), rho, alpha, xi};
}

[[maybe_unused]] void run_combine(Case& c) {
    const RestoredLists lists(c);
    combine(c.target, {c.dtype, c.numels}, lists.restored(), read_penalty(c));
}

struct FourGradients {
    explicit FourGradients(Case& c)
        : grads(c.list()), grads_ahead(c.list()), adversarial_grads(c.list()), adversarial_grads_ahead(c.list()) {}
    Gradients gradients() const { return {grads, grads_ahead, adversarial_grads, adversarial_grads_ahead}; }

    Addresses grads, grads_ahead, adversarial_grads, adversarial_grads_ahead;
};

Weights<double> read_weights(Case& c) {
    const double w0 = c.number();
    const double w1 = c.number();
    const double w2 = c.number();
    const double w3 = c.number();
    return {w0, w1, w2, w3};
}

[[maybe_unused]] void run_projection(Case& c) {
    const Elements elements{c.dtype, c.numels};
    const FourGradients lists(c);
    const Weights<double> weights = read_weights(c);
    const std::vector<void*> results = c.scalars(3);
    const Buffer scratch(0, projection_scratch_bytes(elements));
    std::memset(scratch.data(), 0xff, scratch.bytes());
    projection(c.target, elements, lists.gradients(), weights, scratch.data(), {results[0], results[1], results[2]});
}

[[maybe_unused]] void run_decompose(Case& c) {
    const FourGradients lists(c);
    const Weights<double> weights = read_weights(c);
    const double xi = c.number();
    const void* const projection = c.scalar();
    const void* const plus_norm = c.scalar();
    decompose(c.target, {c.dtype, c.numels}, lists.gradients(), {projection, plus_norm, weights, xi});
}

struct Step {
    explicit Step(Case& c) : penalty(read_penalty(c)) {
        grad_scale = static_cast<const float*>(c.scalar());
        found_inf = static_cast<const float*>(c.scalar());
        lr_tensor = c.scalar();
        for (void* const guard : c.scalars(static_cast<size_t>(c.number()))) {
            guards.push_back(guard);
        }
        lr = c.number();
        maximize = c.flag();
        write_grads = c.flag();
        rounding_seed = c.rounding_seed;
    }
    StepArguments arguments() const {
        return {penalty, guards, grad_scale, found_inf, lr_tensor, lr, maximize, write_grads, rounding_seed};
    }

    Penalty penalty;
    std::vector<const void*> guards;
    const float* grad_scale;
    const float* found_inf;
    const void* lr_tensor;
    double lr;
    bool maximize;
    bool write_grads;
    std::optional<uint64_t> rounding_seed;
};

[[maybe_unused]] void run_sgd_step(Case& c) {
    SGDArguments sgd = {};
    sgd.momentum = c.number();
    sgd.dampening = c.number();
    sgd.weight_decay = c.number();
    sgd.nesterov = c.flag();
    sgd.first_step = c.flag();
    const RestoredLists lists(c);
    const Addresses momentum_buffers = c.list_if(sgd.momentum != 0);
    const Step step(c);
    sgd_step(c.target, {c.dtype, c.numels}, lists.restored(), momentum_buffers, step.arguments(), sgd);
}

[[maybe_unused]] void run_adamw_step(Case& c) {
    AdamWArguments adamw = {};
    adamw.beta1 = c.number();
    adamw.beta2 = c.number();
    adamw.eps = c.number();
    adamw.weight_decay = c.number();
    adamw.decoupled_weight_decay = c.flag();
    adamw.amsgrad = c.flag();
    const RestoredLists lists(c);
    const Addresses exp_avgs = c.list();
    const Addresses exp_avg_sqs = c.list();
    const Addresses max_exp_avg_sqs = c.list_if(adamw.amsgrad);
    const Addresses state_steps = c.list();
    const Step step(c);
    adamw_step(c.target, {c.dtype, c.numels}, lists.restored(), {exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps},
               step.arguments(), adamw);
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 3) {
        throw std::runtime_error("usage: harness CASE RESULT");
    }
    const std::map<std::string, void (*)(Case&)> operators = {
#ifdef WITH_L2_NORM
        {"l2_norms", run_l2_norms},     {"difference_norm", run_difference_norm},
#endif
#ifdef WITH_PERTURB
        {"perturb", run_perturb},
#endif
#ifdef WITH_SHIFT
        {"shift", run_shift},
#endif
#ifdef WITH_COMBINE
        {"restore", run_restore},       {"combine", run_combine},
#endif
#ifdef WITH_DECOMPOSE
        {"projection", run_projection}, {"decompose", run_decompose},
#endif
#ifdef WITH_SGD
        {"sgd_step", run_sgd_step},
#endif
#ifdef WITH_ADAMW
        {"adamw_step", run_adamw_step},
#endif
    };
    Case c{Reader(arguments[1])};
    cuda_on_host::random_order.seed(c.seed);
    operators.at(std::string(c.name.begin(), c.name.end()))(c);
    if (c.next_buffer != c.buffers.size() || c.next_number != c.numbers.size()) {
        throw std::runtime_error("the case has more arguments than its operator takes");
    }
    std::ofstream result(arguments[2], std::ios::binary);
    for (const Buffer& buffer : c.buffers) {
        buffer.check_canary();
        result.write(reinterpret_cast<const char*>(buffer.data()), static_cast<std::streamsize>(buffer.bytes()));
    }
    result.close();
    return result ? 0 : 1;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
