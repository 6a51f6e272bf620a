"""MiniLM as an ONNX graph, built once from the weights: about twice as fast as numpy."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ragline.minilm.files import read_weights

if TYPE_CHECKING:
    from ragline.minilm.files import Weights

HEADS = 12
HIDDEN = 384
HEAD_SIZE = HIDDEN // HEADS
LAYERS = 6
EPSILON = 1e-12
OPSET = 17
"""The first with LayerNormalization; every onnxruntime of the last years reads it."""
IR_VERSION = 8


def graph_file(folder: Path) -> Path:
    """The graph beside the weights, built now if it is not there.

    Guarantees:
        The file appears whole or not at all, also when several processes build it at once.
    """
    target = folder / f"model-opset{OPSET}.onnx"
    if not target.exists():
        import onnx

        handle, scratch = tempfile.mkstemp(dir=folder, suffix=".onnx")
        with os.fdopen(handle, "wb") as stream:
            stream.write(_Graph(read_weights(folder)).build().SerializeToString())
        onnx.checker.check_model(scratch)
        Path(scratch).replace(target)
    return target


class _Graph:
    """Collects nodes; every method returns the name of the value that it adds."""

    def __init__(self, weights: Weights) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._tensors = helper, numpy_helper
        self._weights = weights
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def build(self) -> Any:
        from onnx import TensorProto

        helper = self._helper
        hidden = self._embed()
        # 0 where there is a token, a large negative number where there is padding: added to the attention's
        # scores.
        mask = self._add("Cast", ["attention_mask"], to=TensorProto.FLOAT)
        inverse = self._add("Sub", [self._constant("one", np.float32(1)), mask])
        bias = self._add("Mul", [inverse, self._constant("minus_many", np.float32(-10_000))])
        bias = self._add("Unsqueeze", [bias, self._constant("axes_12", np.array([1, 2], np.int64))])
        for layer in range(LAYERS):
            hidden = self._layer(hidden, bias, f"encoder.layer.{layer}.")
        self._pool(hidden, mask)
        tokens = ["batch", "tokens"]
        graph = helper.make_graph(
            self._nodes,
            "all-MiniLM-L6-v2",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
                for name in ("input_ids", "attention_mask")
            ],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])],
            list(self._constants.values()),
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="ragline"
        )
        model.ir_version = IR_VERSION
        return model

    def _add(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"v{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _constant(self, name: str, value: npt.NDArray[Any] | np.generic) -> str:
        if name not in self._constants:
            self._constants[name] = self._tensors.from_array(
                np.ascontiguousarray(value).reshape(value.shape), name
            )
        return name

    def _weight(self, name: str, *, transposed: bool = False) -> str:
        value = self._weights[name]
        return self._constant(name, value.T if transposed else value)

    def _linear(self, value: str, name: str) -> str:
        product = self._add("MatMul", [value, self._weight(name + ".weight", transposed=True)])
        return self._add("Add", [product, self._weight(name + ".bias")])

    def _normalise(self, value: str, name: str) -> str:
        scale, bias = self._weight(name + ".weight"), self._weight(name + ".bias")
        return self._add("LayerNormalization", [value, scale, bias], axis=-1, epsilon=EPSILON)

    def _embed(self) -> str:
        words = self._add("Gather", [self._weight("embeddings.word_embeddings.weight"), "input_ids"])
        shape = self._add("Shape", ["input_ids"], start=1, end=2)
        zero, one = self._constant("zero_i", np.int64(0)), self._constant("one_i", np.int64(1))
        count = self._add("Squeeze", [shape])
        numbers = self._add("Range", [zero, count, one])
        positions = self._add("Gather", [self._weight("embeddings.position_embeddings.weight"), numbers])
        # Every token is of segment 0: a single text, never a pair.
        segment = self._constant("segment", self._weights["embeddings.token_type_embeddings.weight"][0])
        total = self._add("Add", [self._add("Add", [words, positions]), segment])
        return self._normalise(total, "embeddings.LayerNorm")

    def _heads(self, value: str, order: list[int]) -> str:
        shape = self._constant("heads", np.array([0, 0, HEADS, HEAD_SIZE], np.int64))
        return self._add("Transpose", [self._add("Reshape", [value, shape])], perm=order)

    def _layer(self, hidden: str, bias: str, name: str) -> str:
        attention = name + "attention.self."
        query = self._heads(self._linear(hidden, attention + "query"), [0, 2, 1, 3])
        key = self._heads(self._linear(hidden, attention + "key"), [0, 2, 3, 1])
        value = self._heads(self._linear(hidden, attention + "value"), [0, 2, 1, 3])
        scale = self._constant("scale", np.float32(HEAD_SIZE**0.5))
        scores = self._add("Div", [self._add("MatMul", [query, key]), scale])
        weights = self._add("Softmax", [self._add("Add", [scores, bias])], axis=-1)
        mixed = self._add("Transpose", [self._add("MatMul", [weights, value])], perm=[0, 2, 1, 3])
        joined = self._add("Reshape", [mixed, self._constant("joined", np.array([0, 0, HIDDEN], np.int64))])
        attended = self._linear(joined, name + "attention.output.dense")
        hidden = self._normalise(self._add("Add", [attended, hidden]), name + "attention.output.LayerNorm")
        inner = self._gelu(self._linear(hidden, name + "intermediate.dense"))
        outer = self._linear(inner, name + "output.dense")
        return self._normalise(self._add("Add", [outer, hidden]), name + "output.LayerNorm")

    def _gelu(self, value: str) -> str:
        # The exact form; written this way onnxruntime recognises it and runs it as one kernel.
        root = self._add("Div", [value, self._constant("root_2", np.float32(2**0.5))])
        half = self._add("Add", [self._add("Erf", [root]), self._constant("one", np.float32(1))])
        return self._add("Mul", [self._add("Mul", [value, half]), self._constant("half", np.float32(0.5))])

    def _pool(self, hidden: str, mask: str) -> str:
        """The mean over the tokens that are no padding, at length one."""
        axes = self._constant("axes_1", np.array([1], np.int64))
        weights = self._add("Unsqueeze", [mask, self._constant("axes_2", np.array([2], np.int64))])
        summed = self._add("ReduceSum", [self._add("Mul", [hidden, weights]), axes], keepdims=0)
        mean = self._add("Div", [summed, self._add("ReduceSum", [mask, axes], keepdims=1)])
        norm = self._add("ReduceL2", [mean], axes=[1], keepdims=1)
        return self._add("Div", [mean, norm], output="embedding")
