// The Python module `gam_fused._C_cuda`. Its operators register themselves when it is loaded (ops_cuda.cpp).

#include "build_info.h"

PYBIND11_MODULE(_C_cuda, module) {
    module.def("build_info", [] {
        pybind11::dict info = gam_fused::build_info();
        info["cuda"] = GAM_FUSED_CUDA;
        info["architectures"] = GAM_FUSED_ARCHITECTURES;
        return info;
    });
}
