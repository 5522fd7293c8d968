"""The mapping from arrays to parameters, on sources of a few made-up arrays."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from richhf_jax.convert import mapping
from richhf_jax.convert.source import ConvertError, Source, Tensor
from richhf_jax.network import t5, vit

torch.set_num_threads(1)


def tensor(shape, origin="theirs", start=0.0, dtype=np.float32):
    array = (start + np.arange(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)
    return Tensor(origin, array.shape, array.dtype, lambda: array)


def model(**shapes):
    """Makes parameters by name; "__" stands for "/"."""
    return {
        name.replace("__", "/"): jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()
    }


def source(path="a.npz", unused=None, **tensors):
    return Source(path, "made up", {name.replace("__", "/"): t for name, t in tensors.items()}, unused or {})


def rows(conversion):
    return {row.name: row.status for row in conversion.rows}


def test_loaded_initialised_and_unused():
    given = [
        source("a", w=tensor((2, 3), "w.weight"), more=tensor((4,), "m.weight")),
        source("b", head__b=tensor((3,), "head.bias"), unused={"pooler": (2, 2), "step": None}),
    ]
    conversion = mapping.make_plan(model(w=(2, 3), head__b=(3,), fresh=(5,)), given)
    assert conversion.rows == (
        mapping.Row("initialised", "fresh", (5,)),
        mapping.Row("loaded", "head/b", (3,), "[2] head.bias"),
        mapping.Row("loaded", "w", (2, 3), "[1] w.weight"),
        mapping.Row("unused", "more", (4,), "[1] m.weight"),
        mapping.Row("unused", "pooler", (2, 2), "[2]"),
        mapping.Row("unused", "step", None, "[2]"),
    )
    assert conversion.tensors.keys() == {"w", "head/b"}
    np.testing.assert_array_equal(conversion.tensors["w"].read(), np.arange(6.0).reshape(2, 3))


def test_planning_reads_nothing():
    def read():
        raise AssertionError

    shapes = {"e__layers_0__w": (2,), "e__layers_1__w": (2,), "vit__position_embedding__embedding": (2, 2, 1)}
    given = {name: Tensor(name, shape, np.dtype(np.float16), read) for name, shape in shapes.items()}
    wanted = model(e__layers__w=(2, 2), vit__position_embedding__embedding=(3, 3, 1))
    conversion = mapping.make_plan(wanted, [source(**given)])
    assert {name: (t.shape, t.dtype) for name, t in conversion.tensors.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()
    }


def test_other_types_become_the_models():
    given = source(w=tensor((2,), dtype=ml_dtypes.bfloat16))
    loaded = mapping.make_plan(model(w=(2,)), [given]).tensors["w"]
    assert loaded.dtype == loaded.read().dtype == np.float32


def test_shapes_that_do_not_fit_are_all_listed():
    given = source(w=tensor((2, 3), "w.weight"), v=tensor((4,), "v.weight"), ok=tensor((1,)))
    wanted = model(w=(3, 2), v=(5,), ok=(1,))
    with pytest.raises(ConvertError) as error:
        mapping.make_plan(wanted, [given])
    assert str(error.value).splitlines()[:3] == [
        "these shapes do not fit the model:",
        "  v: (5,) in the model, (4,) in [1] v.weight",
        "  w: (3, 2) in the model, (2, 3) in [1] w.weight",
    ]
    assert "--allow_mismatched_shapes" in str(error.value)
    conversion = mapping.make_plan(wanted, [given], allow_mismatched_shapes=True)
    assert rows(conversion) == {"w": "initialised", "v": "initialised", "ok": "loaded"}
    assert conversion.tensors.keys() == {"ok"}
    table = mapping.format_table(conversion, [given])
    assert "initialised  v   (4,) for (5,)      [1] v.weight does not fit\n" in table


def test_a_vocabulary_of_other_size_does_not_fit():
    given = source(token_embedder__embedding=tensor((32100, 1), "shared.weight"), ok=tensor((1,)))
    with pytest.raises(
        ConvertError, match=r"token_embedder/embedding: \(32128, 1\) in the model, \(32100, 1\)"
    ):
        mapping.make_plan(model(token_embedder__embedding=(32128, 1), ok=(1,)), [given])


def test_the_same_parameter_from_two_sources():
    with pytest.raises(ConvertError, match="w is in both a.npz and b.npz: give one of them"):
        mapping.make_plan(model(w=(1,)), [source("a.npz", w=tensor((1,))), source("b.npz", w=tensor((1,)))])


def test_nothing_in_common():
    with pytest.raises(ConvertError, match=r"a.npz \(.*\): no parameter in common with the model"):
        mapping.make_plan(model(w=(1,)), [source("a.npz", v=tensor((1,)))])


def test_scanned_layers_are_stacked():
    layers = {f"e__layers_{i}__w": tensor((2,), f"block.{i}.w", start=10 * i) for i in range(12)}
    conversion = mapping.make_plan(model(e__layers__w=(11, 2), norm=(1,)), [source(**layers)])
    assert conversion.rows[0] == mapping.Row("loaded", "e/layers/w", (11, 2), "[1] block.0.w ... block.10.w")
    assert rows(conversion)["e/layers_11/w"] == "unused"
    stacked = conversion.tensors["e/layers/w"]
    expected = np.array([[10.0 * i, 10 * i + 1] for i in range(11)])
    np.testing.assert_array_equal(stacked.read(), expected)


@pytest.mark.parametrize("shapes", [[(2,)], [(2,), (3,)]])
def test_a_stack_of_too_few_or_unlike_layers_does_not_fit(shapes):
    layers = {f"e__layers_{i}__w": tensor(shape, f"block.{i}") for i, shape in enumerate(shapes)}
    with pytest.raises(ConvertError, match=r"e/layers/w: \(2, 2\) in the model"):
        mapping.make_plan(model(e__layers__w=(2, 2)), [source(**layers)])


def test_a_position_table_of_another_grid_is_resampled():
    given = source(vit__position_embedding__embedding=tensor((3, 3, 2), "pos"))
    conversion = mapping.make_plan(model(vit__position_embedding__embedding=(5, 4, 2)), [given])
    (row,) = conversion.rows
    assert (row.status, row.shape, row.source_shape) == ("resampled", (5, 4, 2), (3, 3, 2))
    resampled = conversion.tensors["vit/position_embedding/embedding"]
    expected = mapping.resample_positions(np.arange(18.0).reshape(3, 3, 2), (5, 4))
    np.testing.assert_array_equal(resampled.read(), expected)
    assert "(3, 3, 2) -> (5, 4, 2)" in mapping.format_table(conversion, [given])


def test_a_position_table_of_another_width_does_not_fit():
    given = source(vit__position_embedding__embedding=tensor((3, 3, 2), "pos"))
    with pytest.raises(ConvertError, match=r"\(5, 5, 4\) in the model, \(3, 3, 2\)"):
        mapping.make_plan(model(vit__position_embedding__embedding=(5, 5, 4)), [given])


@pytest.mark.parametrize(("old", "new"), [((14, 14), (32, 32)), ((24, 24), (32, 32)), ((24, 24), (14, 20))])
def test_resampling_keeps_constants_and_ramps(old, new):
    def ramp(rows, columns):
        y, x = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
        return np.stack([np.full_like(x, 7.0), x, y, 2 * x - 3 * y], axis=-1).astype(np.float32)

    np.testing.assert_allclose(mapping.resample_positions(ramp(*old), new), ramp(*new), atol=1e-5)


@pytest.mark.parametrize("new", [(32, 32), (7, 40)])
def test_resampling_is_bilinear_with_corners_on_corners(new, rng):
    table = rng.standard_normal((24, 24, 5)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], size=new, mode="bilinear", align_corners=True
    )
    expected = theirs[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(mapping.resample_positions(table, new), expected, atol=1e-5)
    np.testing.assert_allclose(mapping.resample_positions(table, (24, 24)), table, atol=1e-7)


CONFIGS = {
    "t5_config": t5.T5Config(vocab_size=8, num_heads=12, mlp_activations=["gelu", "linear"]),
    "vit_config": vit.ViTConfig(),
}


def with_settings(note="", **settings):
    settings = {name.replace("__", "."): value for name, value in settings.items()}
    return dataclasses.replace(source(w=tensor((1,))), settings=settings, note=note)


def test_settings_that_agree():
    given = with_settings(
        t5_config__num_heads=12,
        t5_config__mlp_activations=("gelu", "linear"),
        vit_config__layer_norm_epsilon=1e-6,
    )
    assert mapping.check_settings(CONFIGS, [given]) == []


def test_what_hardly_matters_is_noted_where_it_differs():
    given = with_settings("look out", vit_config__layer_norm_epsilon=1e-12, vit_config__approximate_gelu=True)
    notes = mapping.check_settings(CONFIGS, [given])
    assert notes == [
        "layer_norm_epsilon is 1e-06 in the model, 1e-12 in a.npz: "
        "give --gin.vit.ViTConfig.layer_norm_epsilon=1e-12 to compute exactly the same",
        "approximate_gelu is False in the model, True in a.npz: "
        "give --gin.vit.ViTConfig.approximate_gelu=True to compute exactly the same",
        "a.npz: look out",
    ]
    conversion = mapping.make_plan(model(w=(1,)), [given])
    assert mapping.format_table(conversion, [given], notes).endswith("\nnote: a.npz: look out")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "t5_config__num_heads",
            8,
            "num_heads is 12 in the model, 8 in a.npz: give --gin.t5.T5Config.num_heads=8",
        ),
        ("t5_config__mlp_activations", ("relu",), r"give --gin.t5.T5Config.mlp_activations=\('relu',\)"),
        ("t5_config__logits_via_embedding", True, "give --gin.t5.T5Config.logits_via_embedding=True"),
        ("vit_config__layer_norm_epsilon", 1e-5, "give --gin.vit.ViTConfig.layer_norm_epsilon=1e-05"),
        ("vit_config__num_heads", 16, "give --gin.vit.ViTConfig.num_heads=16"),
    ],
)
def test_another_setting_that_differs_is_an_error(name, value, message):
    with pytest.raises(ConvertError, match=message):
        mapping.check_settings(CONFIGS, [with_settings(**{name: value})])


def test_the_table_shows_every_parameter_and_counts():
    given = [source("a", w=tensor((2, 3), "w.weight"), more=tensor((4,), "m.weight"))]
    conversion = mapping.make_plan(model(w=(2, 3), layers_10__b=(5,), layers_9__b=(5,)), given)
    assert mapping.format_table(conversion, given) == (
        "[1] a: made up\n"
        "\n"
        "initialised  layers_9/b   (5,)\n"
        "initialised  layers_10/b  (5,)\n"
        "loaded       w            (2, 3)  [1] w.weight\n"
        "unused       more         (4,)    [1] m.weight\n"
        "\n"
        "loaded          1 arrays, 6 numbers\n"
        "resampled       0 arrays, 0 numbers\n"
        "initialised     2 arrays, 10 numbers\n"
        "unused          1 arrays, 4 numbers"
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ([1, np.nan, np.inf], r"a.npz: 2 of the 3 numbers of w.weight are NaN or infinite"),
        (np.array([1.0, 1e300, 0.0]), r"a.npz: 1 of the 3 numbers of w.weight"),
        (np.array([1, 2, 3], np.int8), "w.weight is of type int8; quantised weights"),
    ],
)
def test_only_finite_floating_point_numbers_are_loaded(array, message):
    array = np.array(array, None if isinstance(array, np.ndarray) else np.float32)
    given = source(w=Tensor("w.weight", (3,), array.dtype, lambda: array))
    loaded = mapping.make_plan(model(w=(3,)), [given]).tensors["w"]
    with pytest.raises(ConvertError, match=message):
        loaded.read()


def test_an_error_of_a_read_names_the_file():
    def read():
        raise MemoryError("no memory")

    given = source(w=Tensor("w.weight", (3,), np.dtype(np.float32), read))
    with pytest.raises(ConvertError, match=r"a.npz: w.weight can't be read \(MemoryError: no memory\)"):
        mapping.make_plan(model(w=(3,)), [given]).tensors["w"].read()


def test_copies_must_be_equal():
    used, equal, other = tensor((2, 2), "shared"), tensor((2, 2), "copy"), tensor((2, 2), "head", start=1)
    given = dataclasses.replace(source(w=used), copies={"copy": (equal, used)})
    mapping.check_copies([given])
    assert "unused  copy  (2, 2)  [1], a copy of shared\n" in mapping.format_table(
        mapping.make_plan(model(w=(2, 2)), [given]), [given]
    )
    for wrong in (other, tensor((4,), "head")):
        given = dataclasses.replace(source(w=used), copies={"copy": (equal, used), "head": (wrong, used)})
        with pytest.raises(ConvertError, match=r"a.npz: head \(.*\) has other values than shared \(2, 2\)"):
            mapping.check_copies([given])


@pytest.mark.parametrize("shape", [(2**9, 2**9, 2), (0, 3, 2)])
def test_a_position_table_without_sense_does_not_fit(shape):
    given = source(vit__position_embedding__embedding=Tensor("pos", shape, np.dtype(np.float32), None))
    with pytest.raises(ConvertError, match="do not fit the model"):
        mapping.make_plan(model(vit__position_embedding__embedding=(5, 5, 2)), [given])


def test_names_from_a_file_do_not_reach_the_terminal_as_they_are():
    given = source("a\x1b[2J", **{"w": tensor((1,)), "\x1b]0;title\x07": tensor((1,), "\n[2] forged")})
    table = mapping.format_table(mapping.make_plan(model(w=(1,)), [given]), [given], ["a\rb"])
    assert table.isascii()
    assert not set(table) & {"\x1b", "\x07", "\r"}
    assert "[1] \\n[2] forged\n" in table
    assert str(ConvertError("a\x1b[2J\nb")) == "a\\x1b[2J\nb"
