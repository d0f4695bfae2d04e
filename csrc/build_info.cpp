// The Python module `gam_fused._C`. Its operators register themselves when it is loaded (ops.cpp).

#include "build_info.h"

PYBIND11_MODULE(_C, module) {
    module.def("build_info", &gam_fused::build_info);
}
