// How an extension was built. The macros come from setup.py.

#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace gam_fused {

inline std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "g++ " __VERSION__;
#else
    return "unknown";
#endif
}

inline pybind11::dict build_info() {
    pybind11::dict info;
    info["version"] = GAM_FUSED_VERSION;
    info["torch"] = GAM_FUSED_TORCH;
    info["abi"] = GAM_FUSED_ABI;
    info["compiler"] = compiler();
    info["flags"] = GAM_FUSED_FLAGS;
    return info;
}

}  // namespace gam_fused
