// Adds the row kernels of the CPU to the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace ppo_fast {

void bind_rows(pybind11::module_& m);

}  // namespace ppo_fast
