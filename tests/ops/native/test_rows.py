"""The native row kernels themselves: every instruction set, threads, batches, forks, and memory that is not theirs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops._backends.native import rows as _native_stats
from ppo_fast.ops._backends.native import token_stats
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats
from tests import eager
from tests.helpers import assert_near_truth, assert_same, raises_exactly
from tests.ops.native.isas import DTYPES, ISAS, each_dtype, each_isa, each_vocabulary, logits_of, threads, using

EVERYTHING = pf.PolicyLossConfig(
    dual_clip=1.5, penalty_coef=0.1, ent_coef=0.1, kl_coef=0.1, kl_estimator="full", temperature=0.7
)


def stats_and_gradient(
    logits: Tensor, targets: Tensor, ref: Tensor | None, mask: Tensor | None, upstream: Tensor
) -> tuple[Any, ...]:
    """Log-probability, entropy, KL and the gradient of all three under per-token upstream gradients."""
    logits = logits.detach().clone().requires_grad_()
    stats = pf.token_stats(logits, targets, ref_logits=ref, mask=mask, temperature=0.7, backend="native")
    terms = [x for x in stats if x is not None]
    total = sum((x * up).sum() for x, up in zip(terms, upstream, strict=False))
    return (*stats, torch.autograd.grad(total, logits)[0])


def loss_and_gradient(logits: Tensor, ref: Tensor, mask: Tensor) -> tuple[Any, ...]:
    """Everything that the policy loss returns, and its gradient. Fixed data, of each row its own."""
    generator = torch.Generator().manual_seed(7)
    old, advantages = (torch.randn(mask.shape, generator=generator) for _ in range(2))
    targets = torch.randint(logits.shape[-1], mask.shape, generator=generator)
    leaf = logits.detach().clone().requires_grad_()
    out = pf.policy_loss(leaf, targets, old - 3, advantages, mask, config=EVERYTHING, ref_logits=ref, backend="native")
    return out.loss, out.metrics, tuple(out.per_token or ()), torch.autograd.grad(out.loss, leaf)[0]


@each_isa
@each_vocabulary
@each_dtype
def test_against_float64(isa: str, vocab: int, dtype: torch.dtype) -> None:
    rows = 37
    logits, ref = logits_of(rows, vocab, dtype, banned=True), logits_of(rows, vocab)
    targets, upstream = torch.randint(vocab, (rows,)), torch.randn(3, rows)
    with using(isa):
        ours = stats_and_gradient(logits, targets, ref, None, upstream)
    results = []
    for to in (torch.float32, torch.float64):
        leaf = logits.to(to).requires_grad_()
        u, w = (torch.log_softmax(x.to(to) / 0.7, -1) for x in (leaf, ref))
        safe = u.masked_fill(leaf == -torch.inf, 0.0)
        logprobs = u.gather(-1, targets[:, None])[:, 0]
        terms = (logprobs, -(u.exp() * safe).sum(-1), (u.exp() * (safe - w)).sum(-1))
        used = terms[0].masked_fill(terms[0] == -torch.inf, 0.0), *terms[1:]
        total = sum((x * up.to(to)).sum() for x, up in zip(used, upstream, strict=True))
        gradient = torch.autograd.grad(total, leaf)[0]
        results.append((*terms, gradient))
    counted = results[1][0] != -torch.inf
    for i, (got, torch32, truth) in enumerate(zip(ours, *results, strict=True)):
        is_gradient = i == 3
        torch32 = torch32.to(dtype) if is_gradient else torch32
        assert_near_truth(got[counted], truth[counted], torch32[counted], dtype=dtype, gradient=is_gradient)
    assert (ours[0][~counted] == -torch.inf).all()


@each_isa
@each_dtype
def test_a_peak_in_a_late_block_is_seen_in_every_lane(isa: str, dtype: torch.dtype) -> None:
    rows, vocab = 32, 2100
    peaks = 1500 + torch.arange(rows)
    logits = torch.full((rows, vocab), -900.0).scatter(1, peaks[:, None], 900.0).to(dtype)
    with using(isa):
        stats = pf.token_stats(logits, peaks, ref_logits=logits, backend="native")
    assert not any(x.any() for x in stats)


@each_isa
def test_a_bfloat16_gradient_is_the_float32_one_rounded_once(isa: str) -> None:
    rows, vocab = 400, 1000  # one float32 in 65,536 lies half way between two bfloat16
    logits, targets = logits_of(rows, vocab, torch.bfloat16), torch.randint(vocab, (rows,))
    upstream = torch.randn(3, rows) * torch.logspace(0, -39, rows)  # down to subnormal gradients
    with using(isa):
        rounded = stats_and_gradient(logits, targets, None, None, upstream)
        exact = stats_and_gradient(logits.float(), targets, None, None, upstream)
    assert_same(rounded[-1], exact[-1].bfloat16())
    assert exact[-1].abs()[exact[-1] != 0].min() < 1e-38


@each_isa
@pytest.mark.parametrize("vocab", [32, 256, 2000])
@each_dtype
def test_neither_threads_nor_batch_change_a_bit(isa: str, vocab: int, dtype: torch.dtype) -> None:
    rows = 300
    logits, ref, targets = logits_of(rows, vocab, dtype), logits_of(rows, vocab), torch.randint(vocab, (rows,))
    mask, upstream = torch.rand(rows) < 0.7, torch.randn(3, rows)
    some = torch.arange(rows)[mask][5:18]
    with using(isa):
        whole = stats_and_gradient(logits, targets, ref, mask, upstream)
        with threads(4):
            assert_same(stats_and_gradient(logits, targets, ref, mask, upstream), whole)
        part = stats_and_gradient(logits[some], targets[some], ref[some], None, upstream[:, some])
    assert_same(part, tuple(x[some] for x in whole))


@each_isa
@pytest.mark.parametrize("vocab", [32, 2000])
def test_threads_do_not_change_a_loss(isa: str, vocab: int) -> None:
    rows = 140_000 // vocab
    logits, ref, mask = logits_of(rows, vocab), logits_of(rows, vocab), torch.rand(rows) < 0.7
    values, returns = torch.randn(2, 20_000)
    value_mask = torch.rand(20_000) < 0.7

    def value_loss() -> pf.LossOutput:
        return pf.value_loss(values, returns, value_mask, old_values=values * 0.9, clip=0.1, backend="native")

    with using(isa):
        one = loss_and_gradient(logits, ref, mask), tuple(value_loss())
        with threads(3):
            assert_same((loss_and_gradient(logits, ref, mask), tuple(value_loss())), one)


@each_isa
@each_vocabulary
def test_logprobs_have_the_same_bits_from_each_op(isa: str, vocab: int) -> None:
    logits, targets, old = logits_of(37, vocab), torch.randint(vocab, (37,)), torch.randn(37)
    with using(isa):
        alone = pf.token_logprobs(logits, targets, backend="native")
        stats = pf.token_stats(logits, targets, ref_logits=logits_of(37, vocab), backend="native")
        out = pf.policy_loss(logits.requires_grad_(), targets, old, old, None, backend="native")
    assert_same(stats.logprobs, alone)
    assert_same(out.per_token.logprobs, alone)


@each_dtype
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    logits, ref = logits_of(50, 1100, dtype), logits_of(50, 1100, torch.bfloat16)
    results = []
    for isa in ISAS:
        with using(isa):
            results.append(loss_and_gradient(logits, ref, torch.rand(50) < 2))
    for other in results[1:]:
        torch.testing.assert_close(other[:3], results[0][:3], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(other[3], results[0][3])


@each_isa
def test_a_wide_row_is_as_exact_as_in_torch(isa: str) -> None:
    vocab = 152_064
    logits, targets = logits_of(4, vocab), torch.randint(vocab, (4,))
    truth = eager.token_stats(logits.double(), targets)
    with using(isa):
        ours = pf.token_stats(logits, targets, backend="native")
    for got, theirs, exact in zip(ours[:2], eager.token_stats(logits, targets)[:2], truth[:2], strict=True):
        assert (got - exact).abs().max() <= (theirs - exact).abs().max()


@each_isa
@pytest.mark.parametrize("shift", range(3))
@each_dtype
@pytest.mark.parametrize("vocab", [48, 1040, 2049])
def test_streamed_gradients_have_the_same_bits(
    isa: str, shift: int, dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets, upstream = logits_of(7, vocab, dtype), torch.randint(vocab, (7,)), torch.randn(3, 7)
    with using(isa):
        stored = stats_and_gradient(logits, targets, None, None, upstream)[-1]
        buffer = torch.full((7 * vocab + 8,), torch.nan, dtype=dtype)
        out = buffer[shift : shift + 7 * vocab].view(1, 7, vocab)
        lse = torch.logsumexp(logits.double() / 0.7, -1)[None]
        entropy = pf.entropy(logits, temperature=0.7, backend="native")[None]
        empty = torch.empty(0)
        for size in (1 << 40, 0):
            monkeypatch.setattr(_native_stats, "_LARGE", size)
            grads, rows = (
                RowGrads(upstream[:1], upstream[1:2], None),
                RowInputs(logits[None], targets[None], None, None, 0.7),
            )
            token_stats.token_stats_backward(grads, rows, RowStats(empty, entropy, empty, lse, empty), out)
            torch.testing.assert_close(out[0], stored)
            assert buffer[:shift].isnan().all()
            assert buffer[shift + 7 * vocab :].isnan().all()


GUARDED = """
import ctypes, mmap, torch
import ppo_fast as pf
from ppo_fast.ops._backends.native import token_stats
from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats

PAGE, ROWS = mmap.PAGESIZE, 6
libc = ctypes.CDLL(None)

def guarded_logits(dtype):
    # One page to a row; row 2 and the memory around them cannot be read.
    memory = mmap.mmap(-1, (ROWS + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    logits = torch.frombuffer(memory, dtype=dtype).view(ROWS + 2, -1)
    logits.normal_()
    for page in (0, 3, ROWS + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    return logits[1:-1]

def use_every_kernel(logits):
    targets, mask = torch.full((ROWS,), 3), torch.arange(ROWS) != 2
    targets[2] = -100
    for rows, columns in ((3, 5), (5, -37)):  # wide and narrow rows that end where their page does
        pf.token_stats(logits[rows:, columns:], targets[rows:], backend="native")
    g, lse, empty = mask.float()[None], torch.full((1, ROWS), 9.0, dtype=torch.float64), torch.empty(0)
    rows = RowInputs(logits[None], targets.clamp(min=0)[None], None, None, 1.0)
    stats = RowStats(empty, empty, empty, lse, empty)
    gradients = [token_stats.token_stats_backward(RowGrads(g, None, None), rows, stats)[0]]  # counted, but zero
    leaf = logits.requires_grad_()
    stats = pf.token_stats(leaf, targets, mask=mask, backend="native")
    loss = pf.policy_loss(leaf, targets, None, torch.ones(ROWS), mask, backend="native").loss
    for x in (stats.logprobs.sum() + stats.entropy.sum(), loss, 2 * loss):
        gradients += torch.autograd.grad(x, leaf, retain_graph=True)
    for gradient in gradients:
        assert gradient.isfinite().all() and gradient[0].any() and not gradient[2].any()

for isa in extension.isas():
    extension.set_isa(isa)
    for dtype in (torch.float32, torch.bfloat16):
        use_every_kernel(guarded_logits(dtype))
print("done")
"""


def test_masked_rows_rows_of_zero_gradient_and_neighboring_memory_are_not_read() -> None:
    run = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert run.stdout == "done\n", run.stderr


# Torch's own parallel loops do wait for ever in a forked child, so the child gets no tensor operation large enough.
FORKED = """
import os, torch
import ppo_fast as pf
torch.set_num_threads(2)
rows, vocab = 300, 1000
logits, targets = torch.randn(rows, vocab, requires_grad=True), torch.zeros(rows, dtype=torch.long)
values, returns = torch.randn(2, 300000)

def run():
    loss = pf.policy_loss(logits, targets, None, torch.ones(rows), None, backend="native").loss
    stats = pf.token_stats(logits, targets, backend="native")
    value_loss = pf.value_loss(values, returns, None, backend="native").loss
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, stats.entropy.sum())]
    return [x.detach().numpy().tobytes() for x in (loss, value_loss, *stats[:2], *gradients)]

with torch.autograd.set_multithreading_enabled(False):
    parent = run()
    child = os.fork()
    if child == 0:
        os._exit(0 if run() == parent else 1)
    print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_runs_the_kernels() -> None:
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert run.stdout == "0\n", run.stderr


# Neither a second OpenMP runtime nor a second pool: the kernels' worker is the one that torch's own loop takes.
POOL = """
import os, numpy as np, torch
import ppo_fast as pf
torch.set_num_threads(2)
logits, targets = torch.from_numpy(np.zeros((300, 1000), np.float32)), torch.from_numpy(np.zeros(300, np.int64))

def threads():
    return len(os.listdir("/proc/self/task"))

counts = [threads()]
pf.token_logprobs(logits, targets, backend="native")
counts += [threads()]
logits.exp_()
counts += [threads()]
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
print([count - counts[0] for count in counts], len(libraries))
"""


def test_the_threads_are_those_of_torch() -> None:
    run = subprocess.run([sys.executable, "-c", POOL], capture_output=True, text=True, timeout=60)
    assert run.stdout == "[0, 1, 1] 1\n", run.stderr


def test_an_instruction_set_is_forced_by_the_environment_and_an_empty_variable_forces_none() -> None:
    # Only the module: importing the package takes seconds.
    code = f"import sys; sys.path.insert(0, {str(Path(extension.__file__).parent)!r}); import _C; print(_C.isa())"
    for forced, isa in [*zip(ISAS, ISAS, strict=True), ("", ISAS[0])]:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PPO_FAST_ISA": forced}, check=True
        )
        assert run.stdout == f"{isa}\n"


def test_an_unknown_instruction_set_is_refused() -> None:
    machine = ", ".join(ISAS)
    with raises_exactly(f"PPO_FAST_ISA: expected an instruction set of this machine ({machine}), got mmx"):
        extension.set_isa("mmx")


def test_huge_page_advice_changes_no_contents() -> None:
    x = torch.arange(3_000_000)
    extension.advise_huge_pages(x[5:].data_ptr(), x[5:-7].nbytes)
    extension.advise_huge_pages(x.data_ptr(), 3)
    assert torch.equal(x, torch.arange(3_000_000))


def test_reference_logits_of_other_dtypes_are_widened() -> None:
    logits, ref, targets = logits_of(5, 40), logits_of(5, 40), torch.zeros(5, dtype=torch.long)
    for dtype in (torch.float16, torch.float64):
        as_given = pf.token_stats(logits, targets, ref_logits=ref.to(dtype), backend="native")
        widened = pf.token_stats(logits, targets, ref_logits=ref.to(dtype).float(), backend="native")
        assert_same(tuple(as_given), tuple(widened))


def test_other_dtypes_are_refused() -> None:
    assert set(DTYPES) == {torch.float32, torch.bfloat16}
    with raises_exactly("token_stats: expected a usable backend, got 'native': it does not take torch.float16"):
        pf.token_stats(torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, dtype=torch.long), backend="native")
