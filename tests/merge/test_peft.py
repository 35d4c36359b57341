"""The real PEFT: our merged adapters in it, its own merges where their algebra is right, and the
places where it is not (docs/merging.md quotes these numbers)."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.adapters.lora import Lora
from jaxalign.hf.load import load_spec
from jaxalign.hf.peft import load_peft, save_peft
from jaxalign.merge import methods
from jaxalign.merge.algebra import combine
from jaxalign.merge.methods import Recipe, Weighted
from jaxalign.merge.run import merge
from tests.hf.conftest import hf_model
from tests.merge.conftest import assert_same_updates, tree, updates

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.torch

SITES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
         "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"}  # fmt: skip
A = Lora(4, 8.0)
B = Lora(4, 6.0)  # the rank of A, another scale
SMALL = Lora(2, 6.0, 0.0, ("q", "down"))
UPPER = Lora(4, 6.0, 0.0, layers=(2, 3))
FEW_A, FEW_B = (Lora(4, alpha, 0.0, ("v", "down")) for alpha in (8.0, 6.0))
WIDE = Lora(4, 8.0, 0.0, ("q", "o"))  # [32, 32]: rank 32 cuts nothing
# The version of PEFT whose mistakes the page lists; another may have mended them.
DOCUMENTED = pytest.mark.skipif(
    not peft.__version__.startswith("0.21."), reason="docs/merging.md speaks of PEFT 0.21"
)


class Bench:
    """A base with adapters in PEFT, and the same in our hands."""

    def __init__(self, folder, **adapters: Lora) -> None:
        from peft import PeftModel

        self.folder = folder
        self.model = hf_model("llama3_scaled")
        self.model.save_pretrained(folder / "base")
        self.spec = load_spec(folder / "base")
        self.parts = {}
        for number, (name, adapter) in enumerate(adapters.items(), 1):
            lora = tree(adapter, number, 0.2, self.spec)
            save_peft(folder / name, lora, self.spec, adapter, base_name=str(folder / "base"))
            self.parts[name] = Weighted(lora, adapter, 1.0, name)
        first, *others = adapters
        self.peft = PeftModel.from_pretrained(self.model, folder / first, adapter_name=first)
        for name in others:
            self.peft.load_adapter(folder / name, adapter_name=name)
        self.peft.eval()

    def combine(self, weights, recipe):
        """Ours."""
        return combine(self.weighted(weights), self.spec, recipe)

    def weighted(self, weights):
        return [
            Weighted(p.lora, p.adapter, w, p.name)
            for p, w in zip(self.parts.values(), weights, strict=True)
        ]

    def theirs(self, weights, kind, **options) -> dict:
        """(target, block) -> update of PEFT's merge."""
        self.peft.add_weighted_adapter(
            list(self.parts), list(weights), "merged", combination_type=kind, **options
        )
        return self.update("merged")

    def update(self, name: str) -> dict:
        """(target, block) -> update [in, out] of one of PEFT's adapters, where it has one."""
        found = {}
        for block in range(1, self.spec.layers + 1):
            layer = self.peft.base_model.model.model.layers[block - 1]
            for target, path in SITES.items():
                module = layer.get_submodule(path)
                if name in getattr(module, "lora_A", {}):
                    delta = module.get_delta_weight(name).detach().numpy().T
                    found[target, block] = delta.astype(np.float64)
        return found

    def logits(self, *names: str):
        """PEFT's, with these adapters active at once; none: the bare base."""
        tokens = torch.arange(40).reshape(2, 20) + 3
        with torch.no_grad():
            if not names:
                with self.peft.disable_adapter():
                    return self.peft(tokens).logits
            self.peft.base_model.set_adapter(list(names))
            return self.peft(tokens).logits


def distance(ours: dict, theirs: dict) -> float:
    """‖ours - theirs‖ / ‖ours‖ over all modules; a missing module is zero."""
    lost = sum(np.sum((whole - theirs.get(cell, 0)) ** 2) for cell, whole in ours.items())
    return float(np.sqrt(lost / sum(np.sum(whole**2) for whole in ours.values())))


# --- ours in PEFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [B, SMALL, UPPER], ids=["alike", "small", "upper"])
def test_the_merged_adapter_is_both_side_by_side(tmp_path, other):
    bench = Bench(tmp_path, a=A, b=other)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], [1.0, 1.0], Recipe(), str(tmp_path / "m"))
    report = bench.peft.load_adapter(tmp_path / "m", adapter_name="m")
    assert report.unexpected_keys == []
    assert [key for key in report.missing_keys if "lora_" in key and ".m." in key] == []
    both, ours, bare = bench.logits("a", "b"), bench.logits("m"), bench.logits()
    assert (both - ours).abs().max() < 1e-5
    for name in ("a", "b"):
        assert (bench.logits(name) - ours).abs().max() > 1e-3
    assert (bare - ours).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("other", "recipe"),
    [(SMALL, Recipe("svd", rank=3)), (B, Recipe("average")), (UPPER, Recipe("ties", 5, 0.5)),
     (B, Recipe("dare", 5, 0.5))],
    ids=lambda value: getattr(value, "method", ""),
)  # fmt: skip
def test_every_method_loads(tmp_path, other, recipe):
    bench = Bench(tmp_path, a=A, b=other)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], [0.6, 0.7], recipe, str(tmp_path / "m"))
    bench.peft.load_adapter(tmp_path / "m", adapter_name="m")
    lora, adapter = load_peft(tmp_path / "m", bench.spec)
    ours = updates(lora, adapter, bench.spec)
    assert distance(ours, bench.update("m")) < 1e-6
    assert (bench.logits() - bench.logits("m")).abs().max() > 1e-3


@pytest.mark.parametrize("other", [B, SMALL, UPPER], ids=["alike", "small", "upper"])
def test_into_the_base_is_merge_and_unload(tmp_path, other):
    bench = Bench(tmp_path, a=A, b=other)
    merge(
        [str(tmp_path / "a"), str(tmp_path / "b")], [1.0, 1.0], Recipe(), str(tmp_path / "model"),
        into=str(tmp_path / "base"),
    )  # fmt: skip
    theirs = bench.peft.merge_and_unload(adapter_names=["a", "b"]).state_dict()
    ours = load_file(tmp_path / "model" / "model.safetensors")
    plain = load_file(tmp_path / "base" / "model.safetensors")
    assert set(ours) == set(plain)
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name].numpy(), atol=1e-6, err_msg=name)
    assert (
        np.abs(ours[changed := "model.layers.1.mlp.down_proj.weight"] - plain[changed]).max() > 0.01
    )
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokens = torch.arange(40).reshape(2, 20) + 3
    with torch.no_grad():
        whole = bench.model(tokens).logits  # unloaded: now the merged model
        assert (again(tokens).logits - whole).abs().max() < 1e-5


def test_whole_updates_go_into_the_base_uncut(tmp_path):
    bench = Bench(tmp_path, a=WIDE, b=WIDE)
    recipe = Recipe("ties", density=0.3)
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    merge(paths, [1.0, 1.0], recipe, str(tmp_path / "model"), into=str(tmp_path / "base"))
    ours = load_file(tmp_path / "model" / "model.safetensors")
    plain = load_file(tmp_path / "base" / "model.safetensors")
    theirs = bench.theirs([1.0, 1.0], "ties_svd", svd_rank=32, density=0.3)
    for (target, block), delta in theirs.items():
        name = f"model.layers.{block - 1}.{SITES[target]}.weight"
        np.testing.assert_allclose(ours[name] - plain[name], delta.T, atol=1e-5, err_msg=name)


# --- PEFT's own merges, where they say the same -------------------------------------------------


@pytest.mark.parametrize(
    ("other", "weights"), [(B, (0.6, 0.4)), (SMALL, (1.2, -0.5))], ids=["alike", "small"]
)
def test_cat_is_delta(tmp_path, other, weights):
    bench = Bench(tmp_path, a=A, b=other)
    ours = bench.combine(weights, Recipe("delta"))
    assert_same_updates(ours, bench.theirs(weights, "cat"), rtol=1e-5)


@pytest.mark.parametrize(("weights", "rank"), [((0.6, 0.4), 3), ((1.2, -0.5), 6)], ids=str)
def test_svd_is_svd(tmp_path, weights, rank):
    bench = Bench(tmp_path, a=A, b=B)
    ours = bench.combine(weights, Recipe("svd", rank=rank))
    theirs = bench.theirs(weights, "svd", svd_rank=rank)
    assert_same_updates(ours, theirs, rtol=1e-5)


def test_magnitude_is_magnitude_prune_svd(tmp_path):
    bench = Bench(tmp_path, a=FEW_A, b=FEW_B)
    ours = bench.combine((0.6, 0.4), Recipe("magnitude", 5, 0.3))
    theirs = bench.theirs((0.6, 0.4), "magnitude_prune_svd", svd_rank=5, density=0.3)
    assert_same_updates(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_ties_is_ties_svd_for_equal_weights(tmp_path, weight):
    bench = Bench(tmp_path, a=FEW_A, b=FEW_B)
    ours = bench.combine((weight, weight), Recipe("ties", 5, 0.3))
    theirs = bench.theirs((weight, weight), "ties_svd", svd_rank=5, density=0.3)
    assert_same_updates(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_is_dare_svd_for_equal_dice(tmp_path, monkeypatch, method):
    """Both drop what is larger than a bound, instead of throwing dice."""

    def ours(update, density, dice):
        return np.where(np.abs(update) < 0.05, update / np.float32(density), 0)

    def theirs(tensor, density, rescale):
        assert rescale
        return torch.where(tensor.abs() < 0.05, tensor / density, 0.0)

    monkeypatch.setattr(methods, "drop", ours)
    monkeypatch.setattr("peft.utils.merge_utils.random_pruning", theirs)
    bench = Bench(tmp_path, a=FEW_A, b=FEW_B)
    merged = bench.combine((0.6, 0.6), Recipe(method, 5, 0.3))
    kind = {"dare": "dare_linear_svd", "dare_ties": "dare_ties_svd"}[method]
    there = bench.theirs((0.6, 0.6), kind, svd_rank=5, density=0.3)
    assert_same_updates(merged, there, rtol=1e-4)


def test_average_is_linear_of_squared_weights(tmp_path):
    """PEFT's linear puts the root of weight times scale on each factor."""
    same = Lora(4, 8.0)
    bench = Bench(tmp_path, a=A, b=same)
    ours = bench.combine((0.7, 0.3), Recipe("average"))
    assert_same_updates(ours, bench.theirs((0.7**2, 0.3**2), "linear"), rtol=1e-5)


def test_one_after_another_is_delta(tmp_path):
    """peft#643: merging into the base one by one; only cat and svd add updates."""
    bench = Bench(tmp_path, a=A, b=B)
    before = {k: v.clone() for k, v in bench.peft.state_dict().items() if "base_layer" in k}
    ours = updates((m := bench.combine((1, 1), Recipe("delta"))).lora, m.adapter, bench.spec)
    bench.peft.merge_adapter(adapter_names=["a", "b"])
    after = bench.peft.state_dict()
    for (target, block), delta in ours.items():
        key = f"base_model.model.model.layers.{block - 1}.{SITES[target]}.base_layer.weight"
        moved = (after[key] - before[key]).numpy().T
        np.testing.assert_allclose(moved, delta, atol=1e-5)


# --- where PEFT says something else ------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)], ids=str)
def test_linear_weighs_both_factors_now(tmp_path, weights):
    """peft#1155 was that B is not weighed: weights 1, 0 did not give back the first adapter."""
    bench = Bench(tmp_path, a=A, b=B)
    ours = bench.combine(weights, Recipe("delta"))
    assert_same_updates(ours, bench.theirs(weights, "linear"), rtol=1e-5)


@DOCUMENTED
@pytest.mark.parametrize("kind", ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_merging_factors_is_not_merging_updates(tmp_path, kind, capsys):
    """Σ√w A times Σ√w B holds every product of one adapter's A with another's B."""
    bench = Bench(tmp_path, a=A, b=B)
    ours = bench.combine((0.5, 0.5), Recipe("delta"))
    exact = updates(ours.lora, ours.adapter, bench.spec)
    options = {} if kind == "linear" else {"density": 1.0}  # nothing is pruned
    far = distance(exact, bench.theirs((0.5, 0.5), kind, **options))
    with capsys.disabled():
        print(f"\nPEFT {peft.__version__} {kind}: {far:.0%} away from the weighted sum of updates")
    assert far > 0.5


@DOCUMENTED
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_rank_stabilised_adapters_grow_in_peft(tmp_path, kind):
    """peft#3761: the merged adapter inherits use_rslora, so its scale is sqrt(r), not 1."""
    wide = Lora(4, 8.0, rank_stabilised=True)
    bench = Bench(tmp_path, a=wide, b=wide)
    weights = (1.0, 0.0)
    ours = bench.combine(weights, Recipe("delta"))
    exact = updates(ours.lora, ours.adapter, bench.spec)
    theirs = bench.theirs(weights, kind, **({"svd_rank": 4} if kind == "svd" else {}))
    times = np.sqrt(8 if kind == "cat" else 4)
    assert distance({cell: times * whole for cell, whole in exact.items()}, theirs) < 1e-5


@DOCUMENTED
def test_dora_loses_its_magnitudes_in_peft(tmp_path):
    """peft#3761: one DoRA adapter of weight 1 does not come back."""
    from peft import LoraConfig, get_peft_model

    model = hf_model("llama3_scaled")
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "up_proj"],
                        task_type="CAUSAL_LM")  # fmt: skip
    wrapped = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.arange(40).reshape(2, 20) + 3
    with torch.no_grad():
        alone = wrapped(tokens).logits
        wrapped.add_weighted_adapter(["default"], [1.0], "merged")
        wrapped.set_adapter("merged")
        assert (wrapped(tokens).logits - alone).abs().max() > 0.01


@DOCUMENTED
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_blocks_of_the_second_adapter_are_lost_in_peft(tmp_path, kind):
    """The merged adapter inherits layers_to_transform of the first."""
    lower = Lora(4, 8.0, layers=(1, 2))
    bench = Bench(tmp_path, a=lower, b=B)
    ours = bench.combine((1.0, 1.0), Recipe("delta"))
    exact = updates(ours.lora, ours.adapter, bench.spec)
    theirs = bench.theirs((1.0, 1.0), kind, **({"svd_rank": 8} if kind == "svd" else {}))
    assert {block for _, block in exact} == {1, 2, 3}
    assert {block for _, block in theirs} == {1, 2}


@DOCUMENTED
def test_more_rank_than_a_module_has_breaks_pefts_factors(tmp_path):
    """svd_rank above a module's shorter side: its B is no [out, r]."""
    bench = Bench(tmp_path, a=FEW_A, b=FEW_B)  # v is [32, 16]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        bench.theirs((1.0, 1.0), "svd", svd_rank=24)
    assert_same_updates(
        bench.combine((1.0, 1.0), Recipe("magnitude", 24, 1.0)),
        updates((m := bench.combine((1.0, 1.0), Recipe())).lora, m.adapter, bench.spec),
        rtol=1e-5,
    )


@DOCUMENTED
def test_weight_zero_votes_in_peft(tmp_path):
    """PEFT elects signs before it weighs: an adapter of weight 0 still votes and is counted."""
    bench = Bench(tmp_path, a=WIDE, b=WIDE)
    recipe = Recipe("ties", 32, 0.5)
    ours = bench.combine((1.0, 0.0), recipe)
    alone = combine(bench.weighted((1.0, 0.0))[:1], bench.spec, recipe)
    exact = updates(alone.lora, alone.adapter, bench.spec)
    assert_same_updates(ours, exact)
    theirs = bench.theirs((1.0, 0.0), "ties_svd", svd_rank=32, density=0.5)
    assert distance(exact, theirs) > 0.3
