// The extension module: tensors arrive as addresses, strides and dtype codes, so no torch header is needed
// and one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings/rows.h"
#include "gae/gae.h"

namespace py = pybind11;
using namespace ppo_fast;

namespace {

using View = std::array<int64_t, 3>;  // address, stride of the sequences, stride of the steps (in elements)

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(address));
}

MatrixView matrix(const View& view) { return {pointer<const void>(view[0]), view[1], view[2]}; }

GaeArguments gae_arguments(const View& rewards, const View& values, const View& mask, const View& dones,
                           int64_t bootstrap, int64_t cu_seqlens, bool cu_seqlens_is_int64, int64_t sequences,
                           int64_t steps, double gamma, double lam, bool carry, int64_t advantages, int64_t returns) {
  return {matrix(rewards),
          matrix(values),
          matrix(mask),
          matrix(dones),
          pointer<const void>(bootstrap),
          pointer<const void>(cu_seqlens),
          cu_seqlens_is_int64,
          sequences,
          steps,
          gamma,
          lam,
          carry,
          pointer<void>(advantages),
          pointer<void>(returns)};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of ppo_fast. Arguments are raw and unchecked: call the functions of ppo_fast.ops.";

  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::kFloat32)
      .value("float64", Dtype::kFloat64)
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16);

  py::class_<GaeArguments>(m, "GaeArguments")
      .def(py::init(&gae_arguments), py::arg("rewards"), py::arg("values"), py::arg("mask"), py::arg("dones"),
           py::arg("bootstrap"), py::arg("cu_seqlens"), py::arg("cu_seqlens_is_int64"), py::arg("sequences"),
           py::arg("steps"), py::arg("gamma"), py::arg("lam"), py::arg("carry"), py::arg("advantages"),
           py::arg("returns"));

  m.def("gae_cpu", &cpu::gae, py::arg("args"), py::arg("dtype"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());

  bind_rows(m);

#ifdef PPO_FAST_CUDA
  m.attr("has_cuda") = true;
  m.def("gae_cuda", &cuda::gae, py::arg("args"), py::arg("rewards_dtype"), py::arg("values_dtype"), py::arg("device"),
        py::arg("stream"), py::call_guard<py::gil_scoped_release>());
#else
  m.attr("has_cuda") = false;
#endif
}
