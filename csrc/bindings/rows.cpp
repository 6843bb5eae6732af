#include "bindings/rows.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#include "cpu/huge_pages.h"
#include "cpu/rows/dispatch.h"
#include "cpu/rows/ops.h"

namespace py = pybind11;

namespace ppo_fast {
namespace {

using namespace cpu;

// Where the data of a tensor is; null for None.
std::uintptr_t address(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr));
  if (!found) throw py::error_already_set();
  return found.cast<std::uintptr_t>();
}

// Tensors by name, which must outlive the launch. They cross from Python at once: a crossing for each would take longer
// than a small kernel.
class Tensors {
 public:
  explicit Tensors(const py::kwargs& given) : given_(given) {}

  // Points the pointers of a structure to the tensors of their names; those that are not given stay as they are.
  template <class Class>
  Tensors& into(Class& self) {
    Class::pointers([&](const char* name, auto member) {
      PyObject* const tensor = PyDict_GetItemString(given_.ptr(), name);
      if (tensor == nullptr) return;
      self.*member = reinterpret_cast<std::remove_reference_t<decltype(self.*member)>>(address(tensor));
      ++used_;
    });
    return *this;
  }

  void check_all_used() const {
    if (used_ != given_.size()) throw py::type_error("a tensor that the kernel does not take");
  }

 private:
  const py::kwargs& given_;
  size_t used_ = 0;
};

template <class Class>
Class with_tensors(Class self, const py::kwargs& given) {
  Tensors tensors(given);
  tensors.into(self).check_all_used();
  return self;
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
  rows.def(py::init([](const LogitsView& logits, const LogitsView* ref_logits, const TargetsView* targets,
                       py::handle mask, int64_t rows, int64_t steps, int64_t vocab, float temperature) {
             return Rows{logits,
                         ref_logits == nullptr ? LogitsView{} : *ref_logits,
                         targets == nullptr ? TargetsView{} : *targets,
                         reinterpret_cast<const uint8_t*>(address(mask.ptr())),
                         rows,
                         steps,
                         vocab,
                         temperature};
           }),
           py::arg("logits"), py::arg("ref_logits"), py::arg("targets"), py::arg("mask"), py::arg("rows"),
           py::arg("steps"), py::arg("vocab"), py::arg("temperature"));
}

void bind_token_stats(py::module_& m) {
  m.def(
      "token_stats",
      [](const Rows& rows, int threads, const py::kwargs& tensors) {
        TokenStatsArguments args{};
        args.in = rows;
        args = with_tensors(args, tensors);
        const py::gil_scoped_release release;
        token_stats(args, threads);
      },
      py::arg("rows"), py::arg("threads"));
  m.def(
      "token_stats_backward",
      [](const Rows& rows, const LogitsView& out, int threads, const py::kwargs& tensors) {
        TokenStatsBackwardArguments args{};
        args.in = rows;
        args.out = out;
        args = with_tensors(args, tensors);
        const py::gil_scoped_release release;
        token_stats_backward(args, threads);
      },
      py::arg("rows"), py::arg("out"), py::arg("threads"));
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
  using Number = std::optional<float>;
  m.def(
      "policy_loss",
      [](const Rows& rows, const LogitsView* gradient, float low, float high, float dual_clip,
         PolicyObjective objective, KlEstimator kl_estimator, Number denominator, Number penalty_coef, Number ent_coef,
         Number kl_coef, int threads, const py::kwargs& tensors) {
        PolicyLossArguments args{};
        args.stats.in = rows;
        if (gradient != nullptr) args.gradient = *gradient;
        args.low = low;
        args.high = high;
        args.dual_clip = dual_clip;
        args.objective = objective;
        args.kl_estimator = kl_estimator;
        args.denominator = denominator;
        args.penalty_coef = penalty_coef;
        args.ent_coef = ent_coef;
        args.kl_coef = kl_coef;
        Tensors(tensors).into(args.stats).into(args).check_all_used();
        const py::gil_scoped_release release;
        policy_loss(args, threads);
      },
      py::arg("rows"), py::arg("gradient"), py::arg("low"), py::arg("high"), py::arg("dual_clip"), py::arg("objective"),
      py::arg("kl_estimator"), py::arg("denominator"), py::arg("penalty_coef"), py::arg("ent_coef"), py::arg("kl_coef"),
      py::arg("threads"));
}

void bind_value_loss(py::module_& m) {
  m.def(
      "value_loss",
      [](int64_t rows, bool bfloat16, float clip, std::optional<float> denominator, int threads,
         const py::kwargs& tensors) {
        ValueLossArguments args{};
        args.rows = rows;
        args.bfloat16 = bfloat16;
        args.clip = clip;
        args.denominator = denominator;
        args = with_tensors(args, tensors);
        const py::gil_scoped_release release;
        value_loss(args, threads);
      },
      py::arg("rows"), py::arg("bfloat16"), py::arg("clip"), py::arg("denominator"), py::arg("threads"));
}

void bind_sample_tokens(py::module_& m) {
  m.def(
      "sample_tokens",
      [](const Rows& rows, int64_t top_k, double top_p, int threads, const py::kwargs& tensors) {
        SampleArguments args{};
        args.in = rows;
        args.top_k = top_k;
        args.top_p = top_p;
        args = with_tensors(args, tensors);
        const py::gil_scoped_release release;
        sample_tokens(args, threads);
      },
      py::arg("rows"), py::arg("top_k"), py::arg("top_p"), py::arg("threads"));
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
