"""The part of a captured graph that computes given tensors, by data flow and by mutation.

``m = zeros(..); m[:4] = True; sdpa(attn_mask=m)``: the mask operand *is* the zeros node, and only
the write makes it what it is. A write counts if it happens before the attention reads the mask.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from sparse_compile.passes.mutation import Memory, is_off, memory_of
from sparse_compile.sites.operands import Scope
from sparse_compile.sites.site import Refused

#: Function and method names whose results a mask is computed *from*: they are expensive, random,
#: or take values to Python. The mask program starts after them.
SOURCES = frozenset(
    "linear bilinear matmul mm bmm addmm addbmm baddbmm einsum tensordot mv dot inner outer "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "embedding_bag topk sort argsort kthvalue msort scaled_dot_product_attention softmax "
    "log_softmax layer_norm group_norm rms_norm batch_norm instance_norm "
    "multi_head_attention_forward gelu silu rand randn randint randperm rand_like randn_like "
    "randint_like bernoulli multinomial normal dropout dropout1d dropout2d alpha_dropout "
    "bernoulli_ random_ uniform_ normal_ exponential_ cauchy_ geometric_ log_normal_ item tolist "
    "nonzero unique unique_consecutive masked_select _transformer_encoder_layer_fwd".split()
)
#: Those whose results say nothing of the values of their first argument.
LIKE = frozenset("new_zeros new_ones new_full zeros_like ones_like full_like".split())
#: Those that say where values of their first argument are looked up with the others.
_LOOKS_UP = frozenset("gather index _unsafe_index index_select embedding take".split())
VMAP = "_vmap_increment_nesting"
_OPENING = {VMAP: "vmap", "_enter_autocast": "autocast"}
_CLOSING = {"_vmap_decrement_nesting": "vmap", "_exit_autocast": "autocast"}
LAZY_LOAD = "lazy_load_decompositions"


@dataclass(frozen=True)
class Wanted:
    """A tensor node, and the node that reads it: writes after that do not count."""

    node: Node
    reader: Node


@dataclass(frozen=True)
class Slice:
    """A part of a captured graph.

    Attributes:
        scope: the innermost one that ``leaves`` live in; the others live in its parents.
        leaves: inputs: placeholders, constants of the graph, and results of operations that are not
            sliced through.
        nodes: what is computed, in order; those of outer scopes first.
        outputs: the wanted nodes.
        aliases: for each placeholder of an inner scope, the outer node it stands for.
    """

    scope: Scope
    leaves: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    aliases: Mapping[Node, Node]

    def graph_module(self) -> GraphModule:
        """The slice as a module from ``leaves`` to ``outputs``."""
        graph, copies = Graph(), {}
        for number, leaf in enumerate(self.leaves):
            copies[leaf] = graph.placeholder(f"leaf{number}")
        for node in self.nodes:
            copies[node] = graph.node_copy(node, lambda arg: copies[self._outermost(arg)])
        graph.output(tuple(copies[self._outermost(node)] for node in self.outputs))
        return GraphModule(torch.nn.Module(), graph)

    def _outermost(self, node: Node) -> Node:
        while node in self.aliases:
            node = self.aliases[node]
        return node


class Slicer:
    """Slices graphs; remembers which nodes of a graph share memory."""

    def __init__(self) -> None:
        self._graphs: dict[GraphModule, Order] = {}

    def __call__(self, wanted: Sequence[Wanted], scope: Scope) -> Slice:
        """The slice that computes ``wanted``, all read in ``scope``.

        Raises:
            Refused: when the computation has no safe cut.
        """
        aliases: dict[Node, Node] = {}
        nodes: list[Node] = []
        outputs = tuple(want.node for want in wanted)
        leaves: list[Node] = []
        at: Scope | None = None
        here: Scope | None = scope
        while here is not None:
            graph = self.graph(here)
            picked, ends = graph.pick(wanted)
            nodes = picked + nodes
            inputs = [n for n in ends if n.op == "placeholder" and here.parent is not None]
            found = [n for n in ends if n not in inputs]
            if at is not None:
                graph.check_stays(found, wanted[0].reader)
            at = here if found and at is None else at
            leaves += found
            if not inputs:
                return Slice(at or here, tuple(leaves), tuple(nodes), outputs, aliases)
            assert here.call is not None
            feeds = here.feeds
            aliases |= {node: feeds[node] for node in inputs}
            wanted = [Wanted(feeds[node], here.call) for node in inputs]
            here = here.parent
        raise AssertionError("the captured graph has no outer scope")

    def graph(self, scope: Scope) -> Order:
        """What is known of a scope's graph."""
        if scope.gm not in self._graphs:
            outer = None if scope.parent is None else self.graph(scope.parent).memory
            self._graphs[scope.gm] = Order(scope.gm, memory_of(scope, outer))
        return self._graphs[scope.gm]


class Order:
    """One graph: its order, its writes and its bracketed regions."""

    def __init__(self, gm: GraphModule, memory: Memory) -> None:
        self.nodes = list(gm.graph.nodes)
        self.memory, self.position, self.effects = memory, memory.position, memory.effects
        self.writes = {node: e.written for node, e in self.effects.items() if e.written}
        self.brackets = brackets(self.nodes)
        self.lazy_loads = [node for node in self.nodes if call_name(node) == LAZY_LOAD]

    def pick(self, wanted: Sequence[Wanted]) -> tuple[list[Node], list[Node]]:
        """What computes ``wanted`` in this graph, with the brackets around it; and its leaves."""
        forced: set[Node] = set()
        while True:
            nodes, leaves = self._pass(wanted, forced)
            around = self._around(nodes) - forced
            if not around:
                self._check(nodes, leaves, wanted)
                return nodes, leaves
            forced |= around

    def check_stays(self, leaves: Sequence[Node], call: Node) -> None:
        """Leaves that a mask inside a call is computed from must hold there what they did before.

        Raises:
            Refused: one is written to, or the call writes to it.
        """
        memory = {self.memory.of(leaf): leaf for leaf in leaves}
        for node, targets in self.writes.items():
            for leaf in (memory.get(self.memory.of(target)) for target in targets):
                if leaf is None or self.position[node] > self.position[call]:
                    continue
                if self.position[node] > self.position[leaf]:
                    raise Refused(
                        f"the mask inside a checkpoint reads {leaf.name}, which the model writes to"
                    )

    def _pass(self, wanted: Sequence[Wanted], forced: set[Node]) -> tuple[list[Node], list[Node]]:
        """One walk backwards: a node counts if a later one needs its value or its writes."""
        read_at: dict[Node, list[Node]] = {}
        for want in wanted:
            read_at.setdefault(want.reader, []).append(want.node)
        needed: set[Node] = set()
        likened: set[Node] = set()
        memory: set[object] = set()
        picked: list[Node] = []
        leaves: list[Node] = []

        def need(nodes: Iterable[Node]) -> None:
            for node in nodes:
                needed.add(node)
                memory.add(self.memory.of(node))

        for node in reversed(self.nodes):
            need(read_at.get(node, ()))
            writes = any(self.memory.of(t) in memory for t in self.writes.get(node, ()))
            if node not in needed and node not in forced and not writes:
                leaves += [node] if node in likened else []
                continue
            if node.op in ("placeholder", "get_attr") or (self._is_leaf(node) and not writes):
                leaves.append(node)
                continue
            if writes and self._is_source(node):
                raise self._cannot_replay(node)
            picked.append(node)
            like = self._made_like(node)
            likened.update(like)
            need(given for given in node.all_input_nodes if given not in like)
        return picked[::-1], leaves[::-1]

    def _made_like(self, node: Node) -> list[Node]:
        """Scores, say, of which a node reads the dtype or shape, and no value."""
        like = node.args[0] if node.args and call_name(node) in LIKE else None
        if not isinstance(like, Node) or like in tree_leaves((node.args[1:], node.kwargs)):
            return []
        if any(self._encloses(opening, closing, like) for opening, closing in self.brackets):
            return []
        value = like.meta.get("example_value")
        return [like] if isinstance(value, torch.Tensor) and value.is_floating_point() else []

    def _is_leaf(self, node: Node) -> bool:
        """Whether a node is the result of a source, or a part of one that has several."""
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            value = node.args[0].meta.get("example_value")
            return isinstance(value, (tuple, list)) and self._is_leaf(node.args[0])
        return self._is_source(node)

    def _is_source(self, node: Node) -> bool:
        done = self.effects[node]
        if done.random or not done.known:
            return True
        target = node.target
        if target is operator.matmul or isinstance(target, torch._ops.HigherOrderOperator):
            return True
        if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            if str(target).split(".")[0] not in ("aten", "prims", "prim"):
                return True
        name = call_name(node)
        return name in SOURCES and not (name.startswith("dropout") and is_off(node))

    def _cannot_replay(self, node: Node) -> Refused:
        name = call_name(node)
        if self.effects[node].random:
            return Refused(
                f"its mask is random: `{name}` draws it in place",
                "draw it as a new tensor, as torch.rand does, or pass the mask in as an argument",
            )
        if not self.effects[node].known:
            return Refused(
                f"what `{name}` does is not known: it may write to the mask",
                f"make the mask without it, or call `{name}` on a copy",
            )
        return Refused(
            f"the mask is written by `{name}`, which cannot be replayed",
            f"assign the result of `{name}` instead of writing it into the mask",
        )

    def _around(self, nodes: Sequence[Node]) -> set[Node]:
        """The vmap and autocast brackets that some of the nodes stand in."""
        found: set[Node] = set()
        for opening, closing in self.brackets:
            if any(self._encloses(opening, closing, node) for node in nodes):
                found |= {opening, closing}
                first = self.position[opening]
                found |= {node for node in self.lazy_loads if self.position[node] < first}
        return found

    def _encloses(self, opening: Node, closing: Node, node: Node) -> bool:
        return self.position[opening] < self.position[node] < self.position[closing]

    def _check(self, nodes: list[Node], leaves: list[Node], wanted: Sequence[Wanted]) -> None:
        for leaf in leaves:
            if leaf.op != "placeholder" and any(
                call_name(opening) == VMAP and self._encloses(opening, closing, leaf)
                for opening, closing in self.brackets
            ):
                raise Refused(f"the mask reads the result of {call_name(leaf)} inside a vmap")
        given = {self.memory.of(leaf): leaf for leaf in leaves}
        outputs = {self.memory.of(want.node): self.position[want.reader] for want in wanted}
        for node in nodes:
            for target in self.writes.get(node, ()):
                token = self.memory.of(target)
                if token in given:
                    name = given[token].name
                    raise Refused(f"the mask reads {name}, which the model writes to before")
                if self.position[node] > outputs.get(token, len(self.nodes)):
                    raise Refused("a mask changes between the two places that read it")


def brackets(nodes: Sequence[Node]) -> list[tuple[Node, Node]]:
    """The first and the last node of each region of a vmap or an autocast."""
    open_: list[tuple[str, Node]] = []
    found: list[tuple[Node, Node]] = []
    for node in nodes:
        name = call_name(node)
        if name in _OPENING:
            open_.append((_OPENING[name], node))
        elif name in _CLOSING and any(kind == _CLOSING[name] for kind, _ in open_):
            last = max(i for i, (kind, _) in enumerate(open_) if kind == _CLOSING[name])
            found.append((open_.pop(last)[1], node))
    return found


def call_name(node: Node) -> str:
    """What a node calls: the name of a function, a method or an operator."""
    if node.op in ("placeholder", "output", "get_attr"):
        return ""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1])
    return str(target) if isinstance(target, str) else str(getattr(target, "__name__", target))


def values_of(node: Node) -> list[Node]:
    """What the values of a node come from, rather than where they are looked up."""
    sources = node.all_input_nodes
    if call_name(node) not in _LOOKS_UP:
        return sources
    return [source for source in sources if source is node.args[0]]


def made_of(
    node: Node,
    known: Container[Node] = (),
    opaque: Container[Node] = (),
    follow: Callable[[Node], Iterable[Node]] = lambda reader: reader.all_input_nodes,
) -> dict[Node, None]:
    """A node and all that it is computed from.

    Args:
        node: the node.
        known: what counts no more, nor what it is computed from.
        opaque: what counts, but not what it is computed from.
        follow: what of that a node is computed from counts.
    """
    found, front = {node: None}, [node]
    while front:
        reader = front.pop()
        sources = () if reader in opaque else follow(reader)
        new = [source for source in sources if source not in found and source not in known]
        found |= dict.fromkeys(new)
        front += new
    return found
