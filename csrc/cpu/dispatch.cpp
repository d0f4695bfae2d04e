// Which instruction set the CPU kernels use, chosen when they are first needed.

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "chunk_kernels.h"

namespace gam_fused::cpu {

namespace {

const ChunkKernels* const kBestFirst[] = {
#if defined(__x86_64__)
    &kAVX512,
    &kAVX2,
#endif
    &kBaseline,
};

const ChunkKernels& choose() {
    const char* const wanted = std::getenv("GAM_FUSED_CPU_CAPABILITY");
    for (const ChunkKernels* set : kBestFirst) {
        if (wanted == nullptr || *wanted == '\0' ? set->is_supported() : std::strcmp(wanted, set->name) == 0) {
            if (!set->is_supported()) {
                throw std::runtime_error(std::string("GAM_FUSED_CPU_CAPABILITY=") + wanted +
                                         ": this processor does not have these instructions");
            }
            return *set;
        }
    }
    throw std::runtime_error(std::string("GAM_FUSED_CPU_CAPABILITY must be one of avx512, avx2, baseline, got ") +
                             wanted);
}

}  // namespace

const ChunkKernels& chunk_kernels() {
    static const ChunkKernels& chosen = choose();
    return chosen;
}

}  // namespace gam_fused::cpu
