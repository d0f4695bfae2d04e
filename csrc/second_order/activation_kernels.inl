// The loops of activation_kernels.h, included as norm_kernels.inl is.

#include "blocks.inl"

namespace gam_fused::cpu::GAM_FUSED_SET {

namespace {

template <typename Rule, typename T>
void double_backward_of(const ActivationLists& lists, int64_t begin, int64_t size) {
    using A = accumulation_t<T>;
    for_each_block(size, kBlock, [&](int64_t from, int64_t block_size) {
        const int64_t at = begin + from;
        A u_block[kBlock], x_block[kBlock], v_block[kBlock], first_block[kBlock], second_block[kBlock];
        const A* const u = view<T>(u_block, lists.grad_output, at, block_size);
        const A* const x = view<T>(x_block, lists.input, at, block_size);
        const A* const v = view<T>(v_block, lists.double_grad, at, block_size);
        A* __restrict const first = target<T>(first_block, lists.of_grad_output, at);
        A* __restrict const second = target<T>(second_block, lists.of_input, at);
        for (int64_t i = 0; i < block_size; ++i) {
            const Derivatives<A> f = Rule::at(x[i]);
            first[i] = v[i] * f.first;
            second[i] = u[i] * v[i] * f.second;
        }
        put_back<T>(first, lists.of_grad_output, at, block_size);
        put_back<T>(second, lists.of_input, at, block_size);
    });
}

template <typename Rule>
void double_backward(const ActivationLists& lists, int64_t begin, int64_t size) {
    with_type(lists.dtype, [&](auto type) { double_backward_of<Rule, decltype(type)>(lists, begin, size); });
}

}  // namespace

}  // namespace gam_fused::cpu::GAM_FUSED_SET

#define GAM_FUSED_ACTIVATION_KERNELS(set) \
    {#set, set::double_backward<Gelu>, set::double_backward<GeluTanh>, set::double_backward<Silu>}
