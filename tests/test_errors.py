"""Errors: the tree, messages, and plain data."""

import copy
import inspect
import json
import pickle

import pytest

from vlcache_fx import errors
from vlcache_fx.errors import OptionError, PassError, Reason, UnsupportedGraphError, VlcacheError

CLASSES = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_are_documented(cls: type[Exception]) -> None:
    assert issubclass(cls, VlcacheError)
    assert cls.__dict__.get("__doc__")
    assert cls.__name__ in (errors.__doc__ or "")


def test_option_error_is_a_value_error() -> None:
    assert issubclass(OptionError, ValueError)


def test_refusal_message() -> None:
    error = UnsupportedGraphError(
        Reason.UNKNOWN_OP, "aten.sort mixes tokens.", "sort_1", "model.py:12: x.sort()"
    )
    assert str(error) == (
        "graph not supported [unknown_op]: aten.sort mixes tokens "
        "(at node 'sort_1', from model.py:12: x.sort())."
    )


def test_refusal_message_without_node() -> None:
    assert (
        str(UnsupportedGraphError(Reason.BATCHED, "2 samples")) == "graph not supported [batched]: 2 samples."
    )


def test_refusal_as_dict() -> None:
    error = UnsupportedGraphError(Reason.NO_MERGE, "none found", node="add")
    assert json.loads(json.dumps(error.as_dict())) == {
        "reason": "no_merge",
        "detail": "none found",
        "node": "add",
        "source_line": None,
    }


@pytest.mark.parametrize(
    "error", [UnsupportedGraphError(Reason.NO_MERGE, "none", node="add"), PassError("b", ["a"], "broke")]
)
def test_errors_pickle(error: VlcacheError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_reason_values_are_names() -> None:
    assert all(reason.value == reason.name.lower() for reason in Reason)


def test_reason_text_is_one_line() -> None:
    texts = [reason.text for reason in Reason]
    assert all(text and text == " ".join(text.split()) for text in texts)


def test_reason_pickles() -> None:
    for reason in Reason:
        assert pickle.loads(pickle.dumps(reason)) is copy.deepcopy(reason) is Reason(str(reason)) is reason


def test_pass_error_message() -> None:
    error = PassError("splice_rows", ["tag", "insert_lookups"], "no frontier")
    assert str(error) == "pass 'splice_rows': no frontier (it ran after: tag, insert_lookups)."
    assert error.passes_before == ("tag", "insert_lookups")
    assert "no other pass" in str(PassError("first"))
