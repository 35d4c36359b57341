"""The reader of compiled programs: hand-written texts, and programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.plan.cost import measure
from jaxalign.plan.hlo import dims, parse, size

LOOP = """
HloModule m, is_scheduled=true

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]) tuple(%next, %y)
}

%condition (q: (s32[], f32[8,8])) -> pred[] {
  %q = (s32[], f32[8,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(END)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(ZERO)
  %start = (s32[], f32[8,8]) tuple(%zero, %x)
  %loop = (s32[], f32[8,8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""

ONE = """
HloModule m, is_scheduled=true

%fused (a: bf16[16,32], b: bf16[32,64]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  ROOT %d = bf16[16,64]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[16,32], b: bf16[32,64]) -> bf16[16,64] {
  %a = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,64]{1,0} parameter(1)
  OPS
}
"""
FUSION = "%f = bf16[16,64]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused"


def one(*ops: str):
    return ONE.replace("OPS", "\n  ".join(ops))


def product(rows, inner, columns):
    return 2.0 * rows * inner * columns


def test_shapes():
    assert size("bf16[16,32]{1,0:T(8,128)(2,1)}") == 1024
    assert size("(f32[2,3], s4[8], pred[10], token[])") == 24 + 4 + 10
    assert size("f8e4m3fn[10]") == 10
    assert size("f32[]") == 4
    assert dims("f32[2,3]{1,0}") == [2, 3]
    assert dims("f32[]") == []


def test_parse_finds_computations_and_the_entry():
    computations, entry = parse(LOOP.replace("END", "8").replace("ZERO", "0"))
    assert entry == "main"
    assert set(computations) == {"body", "condition", "main"}
    assert computations["body"].root == "t"
    assert computations["main"].ops["loop"].attribute("body") == "body"


@pytest.mark.parametrize(
    ("start", "end", "turns"), [("0", "8", 4), ("0", "7", 4), ("3", "8", 3), ("9", "8", 0)]
)
def test_a_loop_counts_as_often_as_it_turns(start, end, turns):
    cost = measure(LOOP.replace("END", end).replace("ZERO", start))
    assert cost.flops == turns * product(8, 8, 8)
    assert not cost.unknown


def test_a_told_trip_count_is_believed():
    told = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    text = LOOP.replace("body=%body", told)
    text = text.replace("%zero = s32[] constant(ZERO)", "%zero = s32[] parameter(1)")
    assert measure(text.replace("END", "8")).flops == 5 * product(8, 8, 8)


def test_an_open_loop_is_named_or_counted_as_asked():
    text = LOOP.replace("END", "8").replace("%zero = s32[] constant(ZERO)",
                                            "%zero = s32[] parameter(1)")  # fmt: skip
    cost = measure(text)
    assert cost.unknown == ["loop loop"]
    assert cost.flops == product(8, 8, 8)
    assert measure(text, open_loops=3).flops == 3 * product(8, 8, 8)
    assert not measure(text, open_loops=3).unknown


def test_a_fusion_has_the_cycles_of_its_call_and_the_work_inside():
    inner = '"estimated_cycles":"7"'
    text = one(f'ROOT {FUSION}, backend_config={{"window_config":{{}},"estimated_cycles":"120"}}')
    text = text.replace("rhs_contracting_dims={0}\n}", f"rhs_contracting_dims={{0}}, x={inner}\n}}")
    cost = measure(text)
    assert cost.flops == product(16, 32, 64)
    assert cost.cycles == 120


@pytest.mark.parametrize(
    ("cycles", "wrong"), [("655", False), ("20000", False), ("500", True), ("20000000", True)]
)
def test_an_estimate_that_cannot_be_true_is_named(cycles, wrong):
    # 16 x 32 x 64 products at 100 FLOPs a cycle: 655 cycles.
    text = one(f'ROOT {FUSION}, backend_config={{"estimated_cycles":"{cycles}"}}')
    assert bool(measure(text, rate=100).unknown) == wrong
    assert not measure(text).unknown


GATHER = (
    "%g = bf16[64,32]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
)


@pytest.mark.parametrize(
    ("op", "kind", "moved"),
    [
        (GATHER, "all-gather", 3 * 1024),
        (GATHER.replace("{{0,1,2,3}}", "[2,8]<=[16]"), "all-gather", 7 * 1024),
        (GATHER.replace("{{0,1,2,3}}", "mesh['x'=2,'y'=4] {'y'}"), "all-gather", 3 * 1024),
        ("%g = bf16[16,32]{1,0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%add",
         "all-reduce", 1024),
        ("%g = bf16[4,32]{1,0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, to_apply=%add",
         "reduce-scatter", 768),
        ("%g = bf16[16,32]{1,0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}",
         "collective-permute", 1024),
    ],
)  # fmt: skip
def test_bytes_that_a_device_sends(op, kind, moved):
    cost = measure(one("ROOT " + op))
    assert cost.collectives[kind].count == 1
    assert cost.collectives[kind].bytes == moved == cost.traffic
    assert cost.collectives[kind].hidden == 0


def test_an_asynchronous_collective_is_hidden_and_counts_once():
    start = GATHER.replace("%g = bf16[64,32]{1,0} all-gather", "%s = (bf16[16,32], bf16[64,32]) "
                           "all-gather-start")  # fmt: skip
    cost = measure(one(start, "ROOT %d = bf16[64,32]{1,0} all-gather-done(%s)"))
    assert cost.collectives["all-gather"].count == 1
    assert cost.collectives["all-gather"].hidden == cost.traffic == 3 * 1024


def test_a_collective_woven_into_fusions_counts_once_by_its_channel():
    inner = GATHER.replace("%g = bf16", "%a = bf16[16,32]{1,0} parameter(0)\n  ROOT %g = bf16")
    fused = f"%woven (a: bf16[16,32]) -> bf16[64,32] {{\n  {inner}\n}}\n\n"
    calls = [
        f"{name} = bf16[64,32]{{1,0}} fusion(%a), kind=kCustom, calls=%woven"
        for name in ("%f1", "ROOT %f2")
    ]
    cost = measure(one(*calls).replace("ENTRY", fused + "ENTRY"))
    assert cost.collectives["all-gather"].count == 1
    assert cost.collectives["all-gather"].hidden == 3 * 1024


@pytest.mark.parametrize(("kind", "word"), [("call-start", "to_apply"), ("async-start", "calls")])
def test_a_collective_that_another_core_runs_is_hidden_and_counts_once(kind, word):
    inner = GATHER.replace("%g = bf16", "%a = bf16[16,32]{1,0} parameter(0)\n  ROOT %g = bf16")
    aside = f"%aside (a: bf16[16,32]) -> bf16[64,32] {{\n  {inner}\n}}\n\n"
    calls = [
        f"%s = ((bf16[16,32]), bf16[64,32]) {kind}(%a), {word}=%aside",
        f"ROOT %d = bf16[64,32]{{1,0}} {kind.replace('start', 'done')}(%s)",
    ]
    cost = measure(one(*calls).replace("ENTRY", aside + "ENTRY"))
    assert cost.collectives["all-gather"].count == 1
    assert cost.collectives["all-gather"].hidden == cost.traffic == 3 * 1024


def test_the_dearer_branch_of_a_conditional_counts():
    branch = "%{name} (a: bf16[16,32]) -> bf16[16,16] {{\n  %a = bf16[16,32]{{1,0}} parameter(0)\n"
    branch += "  ROOT %d = bf16[16,16]{{1,0}} {what}\n}}\n\n"
    dot = "dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    branches = branch.format(name="cheap", what="broadcast(%a)") + branch.format(
        name="dear", what=dot
    )
    for words in (
        "branch_computations={%cheap, %dear}",
        "true_computation=%dear, false_computation=%cheap",
    ):
        op = f"ROOT %c = bf16[16,16]{{1,0}} conditional(%a, %a, %b), {words}"
        assert measure(one(op).replace("ENTRY", branches + "ENTRY")).flops == product(16, 32, 16)


def test_kernels_are_counted_by_who_knows_them_or_named():
    call = (
        'ROOT %splash = bf16[16,64]{1,0} custom-call(%a, %b), custom_call_target="tpu_custom_call"'
    )
    seen = []

    def kernels(op, shapes):
        seen.append((op.name, [dims(shape) for shape in shapes]))
        return 42.0

    cost = measure(one(call), kernels)
    assert (cost.flops, cost.kernel_flops, cost.unknown) == (42, 42, [])
    assert seen == [("splash", [[16, 32], [32, 64]])]
    assert measure(one(call)).unknown == ["kernel splash"]
    assert not measure(one(call.replace("tpu_custom_call", "Sharding"))).unknown


def test_products_handed_to_cublas():
    numbers = '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    call = (
        "ROOT %gemm = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        f'{{"alpha_real":1,"dot_dimension_numbers":{numbers}}}}}'
    )
    cost = measure(one(call))
    assert cost.flops == product(16, 32, 64)
    assert not cost.unknown


@pytest.mark.parametrize(
    ("labels", "window", "flops"),
    [
        # A product written as a convolution, as the TPU compiler does.
        ("bf_io->bf", "", product(16, 32, 64)),
        ("0bf_0io->0bf", "size=1", product(16, 32, 64)),
    ],
)
def test_a_convolution_without_space_is_a_product(labels, window, flops):
    lead = "1," if "0" in labels else ""
    words = f", window={{{window}}}" if window else ""
    text = one(
        f"ROOT %c = bf16[{lead}16,64]{{1,0}} convolution(%a, %b){words}, dim_labels={labels}"
    )
    for shape in ("16,32", "32,64"):
        text = text.replace(f"= bf16[{shape}]", f"= bf16[{lead}{shape}]")
    assert measure(text).flops == flops


def test_padding_of_a_convolution_is_no_work():
    # 8 numbers, 3 wide, 1 of padding on either side: 8 * 3 - 2 products meet real numbers.
    text = one(
        "%x = f32[1,8,1]{2,1,0} parameter(2)",
        "%w = f32[3,1,1]{2,1,0} parameter(3)",
        "ROOT %c = f32[1,8,1]{2,1,0} convolution(%x, %w), window={size=3 pad=1_1}, "
        "dim_labels=b0f_0io->b0f",
    )
    assert measure(text).flops == 2 * 22


def compiled(function, *shapes, **options):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **options).lower(*arrays).compile().as_text()


def test_a_compiled_scan_of_products():
    def stack(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    cost = measure(compiled(stack, (16, 32), (6, 32, 32)))
    assert cost.flops == 6 * product(16, 32, 32)
    assert not cost.unknown


def test_a_compiled_gradient_does_the_least_work():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    cost = measure(compiled(jax.grad(loss, argnums=(0, 1)), (16, 32), (32, 64)))
    assert cost.flops == 3 * product(16, 32, 64)


def test_nested_loops_multiply():
    def twice(x, weights):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    assert measure(compiled(twice, (8, 16), (3, 16, 16))).flops == 15 * product(8, 16, 16)


def test_a_loop_that_stops_when_it_will_is_open():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x * 0.5, x)

    text = compiled(halve, (16, 16))
    assert len(measure(text).unknown) == 1
    assert measure(text, open_loops=1).flops == product(16, 16, 16)


def test_a_compiled_sum_over_devices():
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    split, whole = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=split)
    w = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))
    text = jax.jit(jnp.dot, out_shardings=whole).lower(x, w).compile().as_text()
    cost = measure(text)
    assert cost.flops == product(16, 32, 64) / 4
    # Every device sends 2 · 3/4 of the float32 result around the ring.
    assert cost.collectives["all-reduce"].bytes == 16 * 64 * 4 * 2 * 3 / 4
