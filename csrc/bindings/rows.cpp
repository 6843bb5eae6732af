#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/rows/dispatch.h"
#include "cpu/rows/ops.h"

namespace py = pybind11;

namespace ppo_fast {
namespace {

using namespace cpu;

// The pointers of a structure, as integers in Python.
template <class Class>
void def_pointers(py::class_<Class>& cls) {
  Class::pointers([&](const char* name, auto member) {
    using Pointer = std::remove_reference_t<decltype(std::declval<Class&>().*member)>;
    cls.def_property(
        name, [member](const Class& self) { return reinterpret_cast<std::uintptr_t>(self.*member); },
        [member](Class& self, std::uintptr_t address) { self.*member = reinterpret_cast<Pointer>(address); });
  });
}

void bind_views(py::module_& m) {
  py::class_<LogitsView> logits(m, "LogitsView");
  logits.def(py::init([](std::uintptr_t data, int64_t stride_b, int64_t stride_t, bool bfloat16, bool streamed) {
    return LogitsView{reinterpret_cast<void*>(data), stride_b, stride_t, bfloat16, streamed};
  }));
  py::class_<TargetsView> targets(m, "TargetsView");
  targets.def(py::init([](std::uintptr_t data, int64_t stride_b, int64_t stride_t, bool is_int64) {
    return TargetsView{reinterpret_cast<const void*>(data), stride_b, stride_t, is_int64};
  }));
  py::class_<Rows> rows(m, "Rows");
  rows.def(py::init([](const LogitsView& logits, const LogitsView& ref_logits, const TargetsView& targets,
                       std::uintptr_t mask, int64_t rows, int64_t steps, int64_t vocab, float temperature) {
             return Rows{logits, ref_logits, targets, reinterpret_cast<const uint8_t*>(mask),
                         rows,   steps,      vocab,   temperature};
           }),
           py::arg("logits"), py::arg("ref_logits"), py::arg("targets"), py::arg("mask"), py::arg("rows"),
           py::arg("steps"), py::arg("vocab"), py::arg("temperature"));
}

void bind_token_stats(py::module_& m) {
  using Forward = TokenStatsArguments;
  py::class_<Forward> forward(m, "TokenStatsArguments");
  forward.def(py::init<>()).def_readwrite("rows", &Forward::in);
  def_pointers(forward);
  using Backward = TokenStatsBackwardArguments;
  py::class_<Backward> backward(m, "TokenStatsBackwardArguments");
  backward.def(py::init<>()).def_readwrite("rows", &Backward::in).def_readwrite("out", &Backward::out);
  def_pointers(backward);
  const auto release = py::call_guard<py::gil_scoped_release>();
  m.def("token_stats", &token_stats, py::arg("args"), py::arg("threads"), release);
  m.def("token_stats_backward", &token_stats_backward, py::arg("args"), py::arg("threads"), release);
}

void bind_policy_loss(py::module_& m) {
  py::enum_<PolicyObjective>(m, "PolicyObjective")
      .value("clip", PolicyObjective::kClip)
      .value("cispo", PolicyObjective::kCispo);
  py::enum_<KlEstimator>(m, "KlEstimator")
      .value("k1", KlEstimator::kK1)
      .value("k2", KlEstimator::kK2)
      .value("k3", KlEstimator::kK3)
      .value("full", KlEstimator::kFull);
  using Args = PolicyLossArguments;
  py::class_<Args> args(m, "PolicyLossArguments");
  args.def(py::init<>())
      .def_readwrite("stats", &Args::stats)
      .def_readwrite("low", &Args::low)
      .def_readwrite("high", &Args::high)
      .def_readwrite("dual_clip", &Args::dual_clip)
      .def_readwrite("objective", &Args::objective)
      .def_readwrite("kl_estimator", &Args::kl_estimator)
      .def_readwrite("gradient", &Args::gradient);
  def_pointers(args);
  m.def("policy_loss", &policy_loss, py::arg("args"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_value_loss(py::module_& m) {
  using Args = ValueLossArguments;
  py::class_<Args> args(m, "ValueLossArguments");
  args.def(py::init<>())
      .def_readwrite("bfloat16", &Args::bfloat16)
      .def_readwrite("clip", &Args::clip)
      .def_readwrite("rows", &Args::rows);
  def_pointers(args);
  m.def("value_loss", &value_loss, py::arg("args"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_sample_tokens(py::module_& m) {
  using Args = SampleArguments;
  py::class_<Args> args(m, "SampleArguments");
  args.def(py::init<>())
      .def_readwrite("rows", &Args::in)
      .def_readwrite("top_k", &Args::top_k)
      .def_readwrite("top_p", &Args::top_p);
  def_pointers(args);
  m.def("sample_tokens", &sample_tokens, py::arg("args"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_rows(py::module_& m) {
  bind_views(m);
  bind_token_stats(m);
  bind_policy_loss(m);
  bind_value_loss(m);
  bind_sample_tokens(m);
  m.def(
      "advise_huge_pages",
      [](std::uintptr_t data, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(data), bytes); },
      py::arg("data"), py::arg("bytes"));
  m.def("isas", &isas);
  m.def("isa", &isa);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def(
      "elementary",
      [](const char* f, std::uintptr_t x, std::uintptr_t y, int64_t n) {
        kernels().elementary(f, reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n);
      },
      py::arg("f"), py::arg("x"), py::arg("y"), py::arg("n"));
}

}  // namespace ppo_fast
