"""benchmarks.language on small Llamas with random weights: the methods by oracles, the rows, the page, the command."""

import copy
import json
import multiprocessing
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.harness import process
from benchmarks.language import llama, methods, page, pruning, slicegpt
from benchmarks.language import run as language

transformers = pytest.importorskip("transformers")

BASELINES = ("wanda", "flap", "second-order", "slicegpt")
# layers, width, heads: large enough for 1 % of the layers' parameters to be several channels
SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 16,
         "num_key_value_heads": 8}  # fmt: skip


def model(biases: bool = True, **sizes: int) -> nn.Module:
    """A Llama with weights large enough for all its parts to matter, and weights of norms other than one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, max_position_embeddings=64, pad_token_id=0, attention_bias=biases, mlp_bias=biases,
        tie_word_embeddings=True, **{**SIZES, **sizes},
    )  # fmt: skip
    made: nn.Module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2)
        elif "bias" in name:
            parameter.normal_(0, 0.1)
        else:
            parameter.mul_(5)
    return made


def tokens(batches: int = 4, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(60, (4, 20), generator=generator)} for _ in range(batches)]


def distance(small: nn.Module, original: nn.Module) -> float:
    """The largest difference of the logits on other tokens, relative to the largest logit."""
    batch = tokens(1, seed=2)[0]
    ours, theirs = small(**batch).logits, original(**batch).logits
    return float((ours - theirs).detach().abs().max() / theirs.abs().max())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("removed", methods.REMOVED)
@pytest.mark.parametrize("method", BASELINES)
def test_the_target_is_met_within_a_percent(method: str, removed: float, biases: bool) -> None:
    original = model(biases)
    small = methods.METHODS[method](methods.Task(copy.deepcopy(original), tokens(), removed, 0))
    left = llama.layer_parameters(small) / llama.layer_parameters(original)
    assert abs(left - (1 - removed)) < 0.01
    assert 1e-3 < distance(small, original) < 10


def test_slicegpt_at_full_width_is_the_dense_model() -> None:
    for original in (model(), model(biases=False, num_key_value_heads=16)):
        assert distance(slicegpt.slicegpt(copy.deepcopy(original), tokens(), 128), original) < 1e-4


def test_slicegpt_is_exact_where_the_stream_has_few_components() -> None:
    original = model()
    basis = torch.linalg.qr(torch.randn(128, 40)).Q
    inside = basis @ basis.T
    original.model.embed_tokens.weight.copy_(original.model.embed_tokens.weight @ inside)
    for layer in original.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(inside @ linear.weight)
            linear.bias.copy_(inside @ linear.bias)
    original.lm_head.weight = nn.Parameter(torch.randn(60, 128), requires_grad=False)
    assert distance(slicegpt.slicegpt(copy.deepcopy(original), tokens(8), 40), original) < 1e-3
    assert distance(slicegpt.slicegpt(copy.deepcopy(original), tokens(8), 36), original) > 1e-2


def test_the_width_of_slicegpt_counts_the_matrices_in_the_adds() -> None:
    original = model()
    for width in (100, 128):
        small = slicegpt.slicegpt(copy.deepcopy(original), tokens(1), width)
        assert llama.layer_parameters(small) == slicegpt.sliced_parameters(original, width)
    assert slicegpt.sliced_width(original, 0.2) < 0.8 * 128


def test_second_order_that_removes_nothing_changes_nothing() -> None:
    original = model()
    assert distance(pruning.prune(copy.deepcopy(original), tokens(), 0.0, pruning.second_order), original) < 1e-5


def doubled(original: nn.Module) -> nn.Module:
    """The same function with each hidden channel of the MLPs twice, of which the second has a larger weight."""
    wide = copy.deepcopy(original)
    for layer in wide.model.layers:
        mlp = layer.mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.bias = nn.Parameter(linear.bias.repeat(2))
            llama.set_weight(linear, linear.weight.repeat(2, 1))
        llama.set_weight(mlp.down_proj, torch.cat([-0.5 * mlp.down_proj.weight, 1.5 * mlp.down_proj.weight], 1))
    return wide


def test_second_order_merges_duplicates_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original = model(intermediate_size=48, num_key_value_heads=2)
    wide = doubled(original)
    assert distance(wide, original) < 1e-5
    removed = llama.layer_parameters(wide) - llama.layer_parameters(original)
    monkeypatch.setattr(pruning, "RIDGE", 1e-9)
    small = pruning.prune(wide, tokens(8), removed / llama.layer_parameters(wide), pruning.second_order)
    assert small.model.layers[0].mlp.down_proj.in_features in (48, 49)  # biases are not counted exactly
    assert distance(small, original) < 1e-3


@pytest.mark.parametrize("size", [1, 2])
def test_elimination_is_greedy_with_all_others_solved_again(size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(90, 14).double() @ torch.randn(14, 14).double(), torch.randn(5, 14).double()
    kept = list(range(14 // size))
    while len(kept) > 3:  # by least squares on the rows, for each candidate
        def loss(candidate: int, kept: Sequence[int] = tuple(kept)) -> float:
            rest = x[:, llama.columns_of(torch.tensor([k for k in kept if k != candidate]), size)]
            y = x @ weight.T
            return float((rest @ torch.linalg.lstsq(rest, y).solution - y).norm())
        kept.remove(min(kept, key=loss))
    found = pruning.eliminate(weight, torch.linalg.inv(x.T @ x), 3, size, step=1)
    assert found.tolist() == kept


def silenced(original: nn.Module, channels: Tensor) -> nn.Module:
    """The model with hidden channels that nothing reads."""
    for layer in original.model.layers:
        layer.mlp.down_proj.weight[:, channels] = 0
    return original


@pytest.mark.parametrize("choice", [pruning.wanda, pruning.second_order])
def test_channels_that_nothing_reads_leave_first(choice: pruning.Choice) -> None:
    original = silenced(model(num_key_value_heads=2), torch.arange(0, 384, 3))
    removed = 2 * 128 * (3 * 128 + 2) / llama.layer_parameters(original)
    small = pruning.prune(copy.deepcopy(original), tokens(), removed * 0.995, choice)
    assert 256 <= small.model.layers[1].mlp.down_proj.in_features <= 260
    assert small.model.layers[1].self_attn.k_proj.out_features == 16
    assert distance(small, original) < 1e-4


@pytest.mark.parametrize("choice", [pruning.wanda, pruning.second_order])
def test_heads_that_nothing_reads_leave_first(choice: pruning.Choice) -> None:
    original = silenced(model(), torch.arange(0, 384, 3))
    for layer, heads in zip(original.model.layers, ([1, 4], [0, 7]), strict=True):
        layer.self_attn.o_proj.weight[:, llama.columns_of(torch.tensor(heads), 16)] = 0
    silent = 2 * (128 * (3 * 128 + 2) + 2 * (2 * 16 + 2 * 8) * 128)  # two heads of eight are less than the share of all
    small = pruning.prune(copy.deepcopy(original), tokens(), 0.995 * silent / llama.layer_parameters(original), choice)
    assert [layer.self_attn.k_proj.out_features for layer in small.model.layers] == [48, 48]
    assert distance(small, original) < 1e-4


def test_wanda_weighs_columns_by_their_inputs() -> None:
    x = torch.tensor([[1.0, 10.0, 0.1, 3.0], [1.0, -10.0, 0.1, 4.0]])
    weight = torch.tensor([[1.0, 0.1, 5.0, 1.0], [1.0, 0.1, 5.0, 0.0]])  # scores: 2, 2, 1, 5
    kept, column = pruning.wanda(weight, [x[None, :1], x[None, 1:]], 1)
    assert kept.tolist() == [3] and column.tolist() == [[1.0], [0.0]]
    assert pruning.wanda(weight, [x], 3)[0].tolist() == [0, 1, 3]


def test_each_layer_sees_what_the_narrowed_ones_before_it_give() -> None:
    seen: list[Tensor] = []

    def choice(weight: Tensor, inputs: Sequence[Tensor], keep: int, size: int) -> tuple[Tensor, Tensor]:
        kept = torch.arange(keep * size)
        seen.append(torch.cat(list(inputs))[..., kept])
        return kept, 2 * weight[:, kept]

    batches, found = tokens(2), []
    small = pruning.prune(model(), batches, 0.3, choice)
    for layer in small.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            found.append([])
            linear.register_forward_pre_hook(lambda _, args, into=found[-1]: into.append(args[0]))
    for batch in batches:
        small(**batch)
    for ours, theirs in zip(seen, found, strict=True):
        torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-4, atol=1e-5)


def test_flap_is_exact_for_channels_that_are_constant() -> None:
    original = model(num_hidden_layers=1)
    constant = torch.arange(0, 384, 4)
    mlp = original.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight[constant] = 0
        linear.bias[constant] = 3
    removed = len(constant) * 3 * 128 / llama.layer_parameters(original)
    small = pruning.flap(copy.deepcopy(original), tokens(), removed, heads=False)
    assert small.model.layers[0].mlp.down_proj.in_features == 384 - len(constant)
    assert small.model.layers[0].self_attn.o_proj.in_features == 128
    assert distance(small, original) < 1e-5


def test_a_head_with_constant_values_leaves_with_its_queries() -> None:
    original = model(num_hidden_layers=1)
    attention = original.model.layers[0].self_attn
    attention.v_proj.weight[8:16] = 0  # the second of eight key-value heads
    small = copy.deepcopy(original)
    narrow = small.model.layers[0].self_attn
    means, variances = pruning.input_statistics(small, tokens())
    assert variances[narrow.o_proj][16:32].max() < 1e-10 < variances[narrow.o_proj][32:].min()
    heads = torch.tensor([0, 2, 3, 4, 5, 6, 7])
    pruning.compensate(narrow.o_proj, means[narrow.o_proj], llama.columns_of(heads, 16))
    llama.keep_heads(narrow, heads)
    assert [narrow.q_proj.out_features, narrow.k_proj.out_features, narrow.o_proj.in_features] == [112, 56, 112]
    assert distance(small, original) < 1e-5


def test_flap_counts_means_and_variances_of_all_batches() -> None:
    original = model(num_hidden_layers=1)
    down = original.model.layers[0].mlp.down_proj
    rows: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    means, variances = pruning.input_statistics(original, tokens(3))
    handle.remove()
    together = torch.cat(rows).double()
    torch.testing.assert_close(means[down], together.mean(0))
    torch.testing.assert_close(variances[down], together.var(0, correction=0))


def test_a_budget_takes_the_lowest_scores_and_leaves_one_of_each() -> None:
    scores = [torch.tensor([3.0, -1.0, 0.0]), torch.tensor([-5.0, -4.0, -3.0, 2.0])]
    for removed, one, other in [(0, [0, 1, 2], [0, 1, 2, 3]), (2.4, [0, 1, 2], [2, 3]), (12, [0, 2], [3]),
                                (23, [0], [3])]:  # fmt: skip
        first, second = pruning.within_budget(scores, [10.0, 1.0], removed)
        assert first.tolist() == one and second.tolist() == other
    with pytest.raises(ValueError, match="30 parameters cannot be removed if each layer keeps a head and a channel"):
        pruning.within_budget(scores, [10.0, 1.0], 30.0)


def test_mlps_that_are_too_small_are_an_error() -> None:
    with pytest.raises(ValueError, match="the MLPs have too few parameters to remove 80% of the layers'"):
        pruning.kept_share(model(), 0.8)


def test_other_layouts_are_an_error() -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=60))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not a decoder of the Llama layout"):
        llama.entering(gpt2.eval(), tokens(1))
    config = transformers.GraniteConfig(vocab_size=60, residual_multiplier=0.3, pad_token_id=0, **SIZES)
    with pytest.raises(ValueError, match="GraniteDecoderLayer does not compute what a Llama layer does"):
        llama.entering(transformers.GraniteForCausalLM(config).eval(), tokens(1))


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_other_models_of_the_layout_are_pruned(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=60, head_dim=8, pad_token_id=0, **SIZES)
    original = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    assert distance(slicegpt.slicegpt(copy.deepcopy(original), tokens(), 128), original) < 1e-4
    for method in ("flap", "second-order"):
        small = methods.METHODS[method](methods.Task(copy.deepcopy(original), tokens(), 0.3, 0))
        assert abs(llama.layer_parameters(small) / llama.layer_parameters(original) - 0.7) < 0.01
        assert distance(small, original) > 0


SMALL = '''"""A Llama
for tests."""
import math
import torch
import transformers
from torch.nn.functional import cross_entropy

def load():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config)
    return model, {"input_ids": tokens("test", 1)}

def tokens(split, n):
    return torch.randint(60, (n, 16), generator=torch.Generator().manual_seed(["test", "valid"].index(split)))

@torch.no_grad()
def evaluate(model, windows=24, split="test"):
    with open(__file__.replace(".py", ".log"), "a") as file:
        file.write(f"{windows} of {split}\\n")
    x = tokens(split, windows)
    out = model(input_ids=x)
    logits = out if torch.is_tensor(out) else out[0]
    return math.exp(cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item())

def calibration(n):
    return [{"input_ids": batch} for batch in tokens("valid", n).split(8)]
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one network."""
    monkeypatch.setattr(process, "PROCESSES", multiprocessing.get_context("fork"))
    found = tmp_path / "nets"
    found.mkdir()
    (found / "small.py").write_text(SMALL)
    return found


def run(folder: Path, *flags: str) -> dict[tuple[float, str], dict[str, Any]]:
    """Run the command; returns the rows of the file by removed share and method."""
    rows = folder.parent / "rows.jsonl"
    out = folder.parent / "out"
    language.main(["--nets", str(folder), "--network", "small", "--out", str(out), "--rows", str(rows), *flags])
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len({(row["removed"], row["method"]) for row in found}) == len(found), "a row was measured twice"
    return {(row["removed"], row["method"]): row for row in found}


@pytest.mark.slow
def test_a_run_is_measured_written_and_resumed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = run(folder, "--only", "dense", "--only", "wanda", "--removed", "0.2")
    assert list(first) == [(0.0, "dense"), (0.2, "wanda")]
    rows = run(folder, *(flag for method in ("dense", *BASELINES) for flag in ("--only", method)))
    assert len(rows) == 1 + 3 * len(BASELINES) and rows[0.2, "wanda"] == first[0.2, "wanda"]
    assert (folder / "small.log").read_text().splitlines() == ["24 of test"] * len(rows)
    assert not [row for row in rows.values() if "error" in row]
    dense, wanda, sliced = rows[0.0, "dense"], rows[0.3, "wanda"], rows[0.3, "slicegpt"]
    layers = 2 * (3 * 32 * 96 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32)
    assert dense["size"] == [layers, layers + 2 * 60 * 32 + 32] and dense["parameters"] == dense["whole"] == 1
    assert wanda["tokens"] == 128 * 16 and wanda["seconds"] > 0 and wanda["peak"] >= 0
    assert abs(wanda["parameters"] - 0.7) < 0.01 and abs(sliced["parameters"] - 0.7) < 0.02
    assert wanda["whole"] == pytest.approx((wanda["parameters"] * layers + 2 * 60 * 32 + 32) / dense["size"][1])

    text = (folder.parent / "out" / "language.md").read_text()
    assert "A Llama for tests." in text and "Calibration: 2,048 tokens." in text and "seed 0." in text
    over = wanda["perplexity"] / dense["perplexity"]
    cells = f"{wanda['perplexity']:.2f} | {over:.2f} | {wanda['parameters']:.1%} | {wanda['whole']:.1%} |"
    assert f"| 30% | wanda | {cells}" in text
    assert f"| 0% | dense | {dense['perplexity']:.2f} | 1.00 | 100.0% | 100.0% |  |  |" in text
    assert "| method | 20% removed | 30% removed | 50% removed |" in text
    assert capfd.readouterr() == ("", "")  # not a terminal


def test_another_seed_has_rows_and_a_page_of_its_own(folder: Path) -> None:
    run(folder, "--only", "dense")
    rows = run(folder, "--only", "wanda", "--removed", "0.3", "--seed", "7")
    assert [row["seed"] for row in rows.values()] == [0, 7]
    text = (folder.parent / "out" / "language.md").read_text()
    assert "seed 7." in text and "dense |" not in text


@pytest.mark.slow
def test_fxmerge_with_and_without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, Any]] = []
    merge = methods.fxmerge.merge

    def observed(model: nn.Module, example: Any, *args: Any, **kwargs: Any) -> Any:
        given.append((example, kwargs["calibration"]))
        return merge(model, example, *args, **kwargs)

    monkeypatch.setattr(methods.fxmerge, "merge", observed)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    original, batches = model(num_hidden_layers=1, **sizes), tokens(2)
    for method in ("fxmerge", "fxmerge-no-data"):
        small = methods.METHODS[method](methods.Task(copy.deepcopy(original), batches, 0.3, 0))
        assert abs(llama.layer_parameters(small) / llama.layer_parameters(original) - 0.7) < 0.02
        assert small(input_ids=batches[1]["input_ids"][:1])[0].shape == (1, 20, 60)
    (example, calibration), (same, none) = given
    assert none is None and len(calibration) == len(batches)
    for one in (example, same):  # a window of the calibration tokens
        assert torch.equal(one["input_ids"], batches[0]["input_ids"][:1])


def test_a_method_that_fails_is_a_row_with_its_error(folder: Path) -> None:
    rows = run(folder, "--only", "dense", "--only", "wanda", "--removed", "0.9")
    assert rows[0.9, "wanda"]["error"] == "ValueError: the MLPs have too few parameters to remove 90% of the layers'"
    text = (folder.parent / "out" / "language.md").read_text()
    assert "| 90% | wanda | failed |  |  |  |  |  |" in text
    assert "- ValueError: the MLPs have too few parameters to remove 90% of the layers': wanda 90%\n" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--network", "b"), r"--network: .*nets has no b; it has small"),
        (("--network", "small", "--removed", "1.5"), r"--removed: 1\.5 is not between 0 and 1"),
        (("--network", "small", "--only", "flops"), "--only: invalid choice: 'flops'"),
    ],
)
def test_a_bad_flag_is_an_error_of_the_command_line(
    flags: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        language.main(["--nets", str(folder), "--out", str(folder / "out"), *flags])
    assert stop.value.code == 2 and not (folder / "out").exists()
    assert re.search(message, capsys.readouterr().err)


def row(removed: float, method: str, **found: Any) -> tuple[tuple[float, str], dict[str, Any]]:
    return (removed, method), {"machine": "a CPU", "torch": "2.6", "transformers": "5", **found}


def test_page_and_plot(tmp_path: Path) -> None:
    cost = {"seconds": 61.2, "peak": 3 * 2**20, "whole": 0.9}
    rows = dict([
        row(0.0, "dense", perplexity=20.0, parameters=1.0, whole=1.0, seconds=0.0, peak=0, size=[2e6, 3e6]),
        row(0.2, "flap", perplexity=30.0, parameters=0.8, **cost),
        row(0.5, "flap", perplexity=12345.6, parameters=0.5, **cost),
        row(0.2, "fxmerge", perplexity=25.0, parameters=0.801, **cost),
        row(0.5, "fxmerge", error="stopped after 5 s, in method"),
    ])  # fmt: skip
    text = page.page(rows, "lm", 3)
    assert "Network: lm, 2.0 million parameters in the decoder layers, 3.0 million in all." in text
    assert "One thread of a CPU, torch 2.6, transformers 5, seed 3." in text and "language.svg" in text
    assert "| flap | 30.00 (1.50) | 12,346 (617.28) |" in text and "| fxmerge | 25.00 (1.25) | out of time |" in text
    assert "| 20% | fxmerge | 25.00 | 1.25 | 80.1% | 90.0% | 61 | 3 |" in text
    assert "- stopped after 5 s, in method: fxmerge 50%" in text
    drawn = {"flap": [(20, 1.5), (50, 617.28)], "fxmerge": [(19.9, 1.25)]}
    assert page.curves(rows) == {method: [pytest.approx(point) for point in curve] for method, curve in drawn.items()}
    assert "language.svg" not in page.page({}, "lm", 0)
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        page.plot(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    page.plot({}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_smallest_share_comes_first() -> None:
    keys = list(language.requested("lm", methods.REMOVED, list(methods.METHODS), 3))
    assert keys[0] == (3, "lm", 0.0, "dense") and len(keys) == len(set(keys)) == 1 + 3 * 6
    assert [key[2] for key in keys[1:]] == [0.2] * 6 + [0.3] * 6 + [0.5] * 6
