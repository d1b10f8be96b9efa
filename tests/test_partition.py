"""`partition` and `combine`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statelessify import combine, errors, partition

keys = st.sampled_from(["body", "head", "weight", "bias", "0", "a.b", "x[1]"])
nested_dicts = st.recursive(
    st.builds(lambda: torch.ones(1)), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=6
).filter(lambda tree: isinstance(tree, dict))


def flat(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Tensor]:
    found = {}
    for key, value in tree.items():
        found |= {(*prefix, key): value} if isinstance(value, Tensor) else flat(value, (*prefix, key))
    return found


def the_same(tree: dict[str, Any], other: dict[str, Any]) -> bool:
    ours, theirs = flat(tree), flat(other)
    return set(ours) == set(theirs) and all(ours[path] is theirs[path] for path in ours)


@given(nested_dicts, st.data())
def test_combine_undoes_partition(tree: dict[str, Any], data: st.DataObject) -> None:
    names = [".".join(path) for path in flat(tree)]
    chosen = data.draw(st.sets(st.sampled_from(names)))
    before = flat(tree)
    selected, rest = partition(tree, lambda name, tensor: name in chosen)
    assert {".".join(path) for path in flat(selected)} == chosen
    assert set(flat(selected)).isdisjoint(flat(rest))
    assert the_same(combine(selected, rest), tree)
    assert the_same(combine(rest, selected), tree)
    assert list(flat(tree)) == list(before)
    for part in (selected, rest):
        assert list(flat(part)) == [path for path in before if path in flat(part)]


@given(nested_dicts, st.data())
def test_globs_select_by_dotted_name(tree: dict[str, Any], data: st.DataObject) -> None:
    names = [".".join(path) for path in flat(tree)]
    globs = st.sampled_from([*names, "*", "*.weight", "head*", "body.*", "?", "[xb]*"])
    patterns = data.draw(st.lists(globs, max_size=3))
    hits = [{name for name in names if name == p or fnmatchcase(name, p)} for p in patterns]
    if not all(hits):
        with pytest.raises(errors.NamesError):
            partition(tree, patterns)
        return
    selected, rest = partition(tree, patterns)
    assert {".".join(path) for path in flat(selected)} == set().union(*hits)
    assert the_same(combine(selected, rest), tree)


def test_examples() -> None:
    params = {"body.w": torch.ones(2, 2), "head.w": torch.ones(2, 2), "head.b": torch.ones(2)}
    assert [list(part) for part in partition(params, "head.*")] == [["head.w", "head.b"], ["body.w"]]
    assert [list(part) for part in partition(params, ("*.b", "body.w"))] == [["body.w", "head.b"], ["head.w"]]
    assert [list(part) for part in partition(params, lambda _, t: t.ndim == 2)] == [["body.w", "head.w"], ["head.b"]]
    assert [list(part) for part in partition(params, (p for p in ["head.b"]))] == [["head.b"], ["body.w", "head.w"]]
    assert [list(part) for part in partition(params, [])] == [[], list(params)]
    assert combine() == {}


def test_combine_leaves_its_arguments_alone() -> None:
    one, two = {"a": {"b": {"c": torch.ones(1)}}}, {"a": {"b": {"d": torch.ones(1)}}, "e": torch.ones(1)}
    both = combine(one, two)
    assert (list(flat(one)), list(flat(two))) == ([("a", "b", "c")], [("a", "b", "d"), ("e",)])
    both["a"]["b"]["z"] = torch.ones(1)
    assert ("a", "b", "z") not in flat(one) | flat(two)


W = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "builtin", "words"),
    [
        (lambda: partition({"head.w": W}, "haed.w"), errors.NamesError, KeyError, ["haed.w", "did you mean `head.w`"]),
        (lambda: partition({"head.w": W}, ["head.*", "tail.*"]), errors.NamesError, KeyError, ["tail.*"]),
        (lambda: partition({"w": W}, [3]), errors.NamesError, KeyError, ["3"]),
        (lambda: partition([W], "*"), errors.TreeError, ValueError, ["list"]),
        (lambda: partition({"w": [W]}, "*"), errors.TreeError, ValueError, ["list"]),
        (lambda: combine({"w": W}, {"w": W}), errors.NamesError, KeyError, ["`w`", "more than one"]),
        (lambda: combine({"a": {"w": W}}, {"a": {"w": W}}), errors.NamesError, KeyError, ["`a.w`"]),
        (lambda: combine({"a": {"w": W}}, {"a": W}), errors.NamesError, KeyError, ["`a`"]),
        (lambda: combine({"a": W}, None), errors.TreeError, ValueError, ["NoneType"]),
    ],
)
def test_bad_input(call: Any, error: Any, builtin: Any, words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, builtin)
    assert [word for word in words if word not in str(caught.value)] == []
