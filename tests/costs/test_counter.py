"""Compares costs with numbers worked out by hand, with XLA's own, and loops with the same ones unrolled."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from richhf_jax.costs import counter

NHWC = ("NHWC", "HWIO", "NHWC")


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def texts(function, *args):
    """Returns a function's unoptimised and optimised text, and XLA's own FLOPs of each."""
    lowered = jax.jit(function).lower(*args)
    compiled = lowered.compile()
    xla = [stage.cost_analysis()["flops"] for stage in (lowered, compiled)]
    return (lowered.as_text(dialect="hlo"), compiled.as_text()), xla


def convolution(x, kernel, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC, **options)


def transposed(x, kernel):
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=NHWC)


# In one dimension, a window of 3 over 8 places meets 8 * 3 of them, less one at each end: 22 pairs.
BY_HAND = {
    "dot": (jnp.matmul, [(8, 16), (16, 4)], 2 * 8 * 16 * 4),
    "batched dot": (
        functools.partial(jnp.einsum, "bij,bkj->bik"),
        [(3, 8, 16), (3, 4, 16)],
        2 * 3 * 8 * 16 * 4,
    ),
    "padded": (convolution, [(2, 8, 8, 3), (3, 3, 3, 5)], 2 * 2 * 22 * 22 * 3 * 5),
    "strided": (
        functools.partial(convolution, strides=(2, 2), padding="VALID"),
        [(2, 9, 9, 3), (3, 3, 3, 5)],
        2 * 2 * (4 * 3) ** 2 * 3 * 5,
    ),
    "grouped": (
        functools.partial(convolution, feature_group_count=2),
        [(2, 8, 8, 4), (3, 3, 2, 6)],
        2 * 2 * 22 * 22 * 2 * 6,
    ),
    # The kernel's elements are 2 apart: 8 meet in the middle, 6 on either side.
    "dilated kernel": (
        functools.partial(convolution, rhs_dilation=(2, 2)),
        [(2, 8, 8, 3), (3, 3, 3, 5)],
        2 * 2 * (8 + 6 + 6) ** 2 * 3 * 5,
    ),
    # Each of 8 inputs meets the kernel's 3 elements, except one beyond the end of the 16 outputs.
    "transposed": (transposed, [(2, 8, 8, 3), (3, 3, 3, 5)], 2 * 2 * (8 * 3 - 1) ** 2 * 3 * 5),
}


@pytest.mark.parametrize(("function", "shapes", "flops"), BY_HAND.values(), ids=BY_HAND)
def test_flops_worked_out_by_hand(function, shapes, flops):
    both, _ = texts(function, *(floats(*shape) for shape in shapes))
    assert [counter.analyze(text).flops for text in both] == [flops, flops]


def many_operations(x, flag):
    probabilities = jax.nn.softmax(jax.nn.standardize(x) * jax.nn.gelu(x))
    pooled = lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")
    scattered = x.at[jnp.array([1, 2])].add(1.0)
    branch = lax.cond(flag > 0, lambda y: y @ y.T @ y, lambda y: y + 1, x)
    return jnp.sort(probabilities) + jnp.cumsum(scattered, 1) + branch, pooled, jnp.argmax(x, 1)


def convolution_gradients(x, kernel):
    def loss(x, kernel):
        return jnp.sum(convolution(x, kernel, (2, 2), feature_group_count=2) ** 2)

    return jax.grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [(many_operations, [(16, 32), ()]), (convolution_gradients, [(2, 8, 8, 4), (3, 3, 2, 6)])],
)
def test_without_loops_the_flops_are_xlas_own(function, shapes):
    both, xla = texts(function, *(floats(*shape) for shape in shapes))
    # The rules are the same, so there is nothing to tolerate.
    assert [counter.analyze(text).flops for text in both] == xla


def layers(x, weights, unroll, remat):
    def layer(x, weight):
        return jnp.tanh(jax.nn.gelu(x @ weight) @ weight.T), None

    return lax.scan(jax.checkpoint(layer) if remat else layer, x, weights, unroll=unroll)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_cost_what_unrolled_ones_do(remat):
    def gradients(unroll):
        def loss(weights, x):
            return jnp.sum(layers(x, weights, unroll, remat) ** 2)

        # Without the gradient of x, the unrolled program's first layer would compute less.
        both, xla = texts(jax.grad(loss, (0, 1)), floats(6, 256, 256), floats(32, 256))
        return [counter.analyze(text) for text in both], xla

    scanned, xla_scanned = gradients(unroll=1)
    unrolled, xla_unrolled = gradients(unroll=6)
    product = 2 * 32 * 256 * 256
    products = 6 * (8 if remat else 6)  # 2 forward, 4 backward, 2 once more
    # Optimised for CPUs, unrolled layers share rematerialised values, so the programs are no longer alike.
    stages = 1 if remat else 2
    for one, other, xla in list(zip(scanned, unrolled, xla_unrolled, strict=True))[:stages]:
        assert other.flops == xla
        assert products * product < other.flops < products * product * 1.02
        # The elementwise operations computed twice differ; one product more would be 2 %.
        assert one.flops == pytest.approx(other.flops, rel=0.01)
        assert one.uncounted_loops == ()
    assert max(xla_scanned) < 0.3 * min(costs.flops for costs in scanned)  # Each body once.


@pytest.mark.parametrize(
    ("name", "trips"), [("from 0", 7), ("from 2", 5), ("nested", 21), ("backwards", 4), ("early exit", 7)]
)
def test_trips(name, trips):
    def early_exit(x):
        def unfinished(carry):
            return (carry[0] < 7) & jnp.any(carry[1] < 1e9)

        return lax.while_loop(unfinished, lambda carry: (carry[0] + 1, carry[1] @ carry[1]), (0, x))

    loops = {
        "from 0": lambda x: lax.fori_loop(0, 7, lambda i, y: y @ x, x),
        "from 2": lambda x: lax.fori_loop(2, 7, lambda i, y: y @ x, x),
        "nested": lambda x: lax.fori_loop(0, 7, lambda i, y: lax.fori_loop(0, 3, lambda j, z: z @ x, y), x),
        "backwards": lambda x: lax.scan(lambda y, _: (y @ x, y), x, None, length=4, reverse=True),
        "early exit": early_exit,
    }
    both, _ = texts(loops[name], floats(16, 16))
    for text in both:
        costs = counter.analyze(text)
        # Beside the product, a trip takes only a few operations on its counter.
        assert trips * 2 * 16**3 <= costs.flops <= trips * (2 * 16**3 + 10)
        assert costs.uncounted_loops == ()


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    def function(n, x):
        return lax.fori_loop(0, n, lambda i, y: y @ x, x)

    both, _ = texts(function, jax.ShapeDtypeStruct((), jnp.int32), floats(16, 16))
    for text in both:
        costs = counter.analyze(text)
        assert 2 * 16**3 <= costs.flops <= 2 * 16**3 + 10
        assert len(costs.uncounted_loops) == 1
        assert costs.uncounted_loops[0] in text


def test_collectives_of_a_loop():
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    def function(x):  # [4, 8] of each device
        def trip(x, _):
            whole = lax.all_gather(x, "data", tiled=True)  # [8, 8]
            x = x + lax.psum(jnp.tanh(x), "data") + jnp.sum(whole)
            x = x + lax.psum_scatter(whole, "data", tiled=True)
            return lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

        return lax.scan(trip, x, None, length=3)[0]

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    costs = counter.analyze(jax.jit(function).lower(x).compile().as_text())
    part, whole = 4 * 8 * 4, 8 * 8 * 4
    assert costs.collectives == {
        "all-gather": counter.Collective(3, 3 * whole, 3 * whole / 2),
        "all-reduce": counter.Collective(3, 3 * part, 3 * 2 * part / 2),
        "reduce-scatter": counter.Collective(3, 3 * whole, 3 * whole / 2),
        "collective-permute": counter.Collective(3, 3 * part, 3 * part),
    }


# Text in the form that libtpu prints: products as convolutions; a counter that starts as a copy; a gather in
# three fusions; a reduction of which each chip keeps a part; arrays on the chip (S(1)); copies from there.
TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%product (p.0: bf16[32,512], p.1: bf16[512,256]) -> bf16[32,256] {
  %p.0 = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[32,256]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%start (p.2: bf16[256,256]) -> (bf16[256,256], bf16[512,256], u32[]) {
  %p.2 = bf16[256,256]{1,0} parameter(0)
  %all-gather.1 = bf16[512,256]{1,0:S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}
  ROOT %custom-call.1 = (bf16[256,256]{1,0}, bf16[512,256]{1,0:S(1)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.3: bf16[256,256], p.4: bf16[512,256], p.5: u32[]) -> bf16[512,256] {
  %p.3 = bf16[256,256]{1,0} parameter(0)
  %p.4 = bf16[512,256]{1,0:S(1)} parameter(1)
  %all-gather.2 = bf16[512,256]{1,0:S(1)} all-gather(%p.3), channel_id=7, replica_groups=mesh['x'=2,'y'=2] {'x'}, dimensions={0}
  %p.5 = u32[]{:S(2)} parameter(2)
  ROOT %custom-call.2 = bf16[512,256]{1,0:S(1)} custom-call(%p.3, %p.4, %all-gather.2, %p.5), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.6: f32[64,128], p.7: s32[]) -> f32[16,128] {
  %p.6 = f32[64,128]{1,0} parameter(0)
  %all-reduce.1 = f32[64,128]{1,0} all-reduce(%p.6), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %p.7 = s32[]{:T(128)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[16,128]{1,0} dynamic-slice(%all-reduce.1, %p.7, %constant.1), dynamic_slice_sizes={16,128}
}

%store (p.8: f32[6,16,128], p.9: f32[16,128], p.10: s32[]) -> f32[6,16,128] {
  %p.8 = f32[6,16,128]{2,1,0} parameter(0)
  %p.9 = f32[16,128]{1,0} parameter(1)
  %bitcast.1 = f32[1,16,128]{2,1,0} bitcast(%p.9)
  %p.10 = s32[]{:T(128)} parameter(2)
  %constant.2 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-update-slice.1 = f32[6,16,128]{2,1,0} dynamic-update-slice(%p.8, %bitcast.1, %p.10, %constant.2, %constant.2)
}

%body (carry.1: (s32[], f32[6,16,128], bf16[32,512], bf16[256,256], f32[64,128])) -> (s32[], f32[6,16,128], bf16[32,512], bf16[256,256], f32[64,128]) {
  %carry.1 = (s32[]{:T(128)}, f32[6,16,128]{2,1,0}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}, /*index=4*/f32[64,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %kept = f32[6,16,128]{2,1,0} get-tuple-element(%carry.1), index=1
  %x = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry.1), index=2
  %w = bf16[256,256]{1,0} get-tuple-element(%carry.1), index=3
  %g = f32[64,128]{1,0} get-tuple-element(%carry.1), index=4
  %fusion.1 = (bf16[256,256]{1,0}, bf16[512,256]{1,0:S(1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start
  %whole = bf16[512,256]{1,0:S(1)} get-tuple-element(%fusion.1), index=1
  %flag = u32[]{:S(2)} get-tuple-element(%fusion.1), index=2
  %fusion.2 = bf16[512,256]{1,0:S(1)} fusion(%w, %whole, %flag), kind=kCustom, calls=%done
  %fusion.3 = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %fusion.2), kind=kOutput, calls=%product
  %fusion.4 = f32[16,128]{1,0} fusion(%g, %i), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.5 = f32[6,16,128]{2,1,0} fusion(%kept, %fusion.4, %i), kind=kLoop, calls=%store
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[6,16,128]{2,1,0}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}, /*index=4*/f32[64,128]{1,0}) tuple(%next, %fusion.5, %x, %w, /*index=4*/%g)
}

%condition (carry.2: (s32[], f32[6,16,128], bf16[32,512], bf16[256,256], f32[64,128])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, f32[6,16,128]{2,1,0}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}, /*index=4*/f32[64,128]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[32,512], w.1: bf16[256,256], g.1: f32[64,128]) -> f32[6,16,128] {
  %x.1 = bf16[32,512]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[256,256]{1,0} parameter(1), metadata={op_name="w"}
  %g.1 = f32[64,128]{1,0} parameter(2), metadata={op_name="g"}
  %copy-start = (bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[32,512]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done = bf16[32,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %zero = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)S(6)} copy(%zero)
  %empty = f32[6,16,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="empty"}
  %tuple.2 = (s32[]{:T(128)}, f32[6,16,128]{2,1,0}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}, /*index=4*/f32[64,128]{1,0}) tuple(%copy.1, %empty, %copy-done, %w.1, /*index=4*/%g.1)
  %while.1 = (s32[]{:T(128)}, f32[6,16,128]{2,1,0}, bf16[32,512]{1,0:T(8,128)(2,1)S(1)}, bf16[256,256]{1,0}, /*index=4*/f32[64,128]{1,0}) while(%tuple.2), condition=%condition, body=%body
  ROOT %result = f32[6,16,128]{2,1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_a_program_for_tpus():
    costs = counter.analyze(TPU)
    product, reduced, counted = 2 * 32 * 512 * 256, 64 * 128, 1
    assert costs.flops == 6 * (product + reduced + counted)
    gathered, whole = 512 * 256 * 2, 64 * 128 * 4
    assert costs.collectives == {
        "all-gather": counter.Collective(6, 6 * gathered, 6 * gathered / 2),
        "reduce-scatter": counter.Collective(6, 6 * whole, 6 * whole * 3 / 4),
    }
    assert costs.uncounted_loops == ()


def test_bytes_of_a_program_for_tpus_are_those_of_main_memory():
    part, number = 256 * 256 * 2, 4
    reduced = 64 * 128 * 4 + number + 16 * 128 * 4
    stored = 16 * 128 * 4 + number + 16 * 128 * 4  # One of six parts, in place.
    counting = 3 * number
    # The gather's start writes its operand again; the product multiplies arrays on the chip.
    trip = (part + part) + part + reduced + stored + counting
    # The copy onto the chip, the counter's beginning, and the empty array.
    before = 32 * 512 * 2 + number + 6 * 16 * 128 * 4
    assert counter.analyze(TPU).bytes_accessed == before + 6 * trip


def test_largest_buffers():
    found = counter.largest_buffers(TPU, limit=4)
    assert found == [
        counter.Buffer(131072, "bf16[256,256]", "w", 1),
        counter.Buffer(131072, "bf16[256,256]", "fusion.1", 1),
        counter.Buffer(49152, "f32[6,16,128]", "fusion.5", 1),
        counter.Buffer(49152, "f32[6,16,128]", "empty", 1),
    ]


def test_bytes_without_loops_are_xlas_own():
    # Operands and results count once each.
    both, _ = texts(lambda x, y: jnp.tanh(x @ y), floats(8, 16), floats(16, 4))
    product = 8 * 16 + 16 * 4 + 8 * 4
    assert counter.analyze(both[1]).bytes_accessed == 4 * (product + 2 * 8 * 4)


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        counter.analyze("module @jit_f {\n}\n")
