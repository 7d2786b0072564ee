import pytest

from loadstone.architecture.keymap import compile_rename, list_names, nearest, unwrap_prefix


def test_a_mapping_renames_whole_names_and_dotted_prefixes_longest_first() -> None:
    rename = compile_rename({"a": "x", "a.b": "y", "c.weight": "z.w"})
    renamed = {"a.q": "x.q", "a.b.q": "y.q", "ab.q": "ab.q", "c.weight": "z.w", "c.bias": "c.bias"}
    assert {name: rename(name) for name in renamed} == renamed


def test_a_prefix_can_be_dropped() -> None:
    assert compile_rename({"model.": ""})("model.layer.weight") == "layer.weight"


def test_patterns_apply_in_order() -> None:
    rename = compile_rename([(r"^h\.(\d+)\.", r"layers.\1."), (r"attn", "attention")])
    assert rename("h.3.attn.weight") == "layers.3.attention.weight"


def test_a_bad_pattern_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"rename= holds '\(', which is no regular expression"):
        compile_rename([("(", "x")])


def test_nested_wrapper_prefixes_are_found() -> None:
    known = {"layer.weight", "layer.bias"}
    names = ["module._orig_mod.layer.weight", "module._orig_mod.layer.bias"]
    assert unwrap_prefix(names, known.__contains__) == ("module._orig_mod.", 2)


def test_a_prefix_that_belongs_there_stays() -> None:
    known = {"model.layer.weight"}
    assert unwrap_prefix(["model.layer.weight"], known.__contains__) == ("", 0)


def test_the_nearest_name_shares_the_leaf() -> None:
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
    assert nearest("layers.0.self_attn.q_proj.weight", names) == names[0]
    assert nearest("something.else.entirely", names) is None


def test_a_long_list_is_cut_with_a_count() -> None:
    assert list_names([f"n{i}" for i in range(10)], limit=2) == "n0, n1 and 8 more"
