"""All checks of `sparc-kernels verify`, in the order of its table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .checks.adam import judge_adam, judge_latent_adam
from .checks.dead import judge_auxk_topk, judge_update_counters
from .checks.decode import judge_decode, judge_decode_nmse, judge_int64_offsets
from .checks.encode import judge_encode, judge_exact, judge_values_at
from .checks.latent_reduce import judge_inverse_index, judge_latent_reduce
from .checks.routes import (
    FORMS,
    judge_again,
    judge_autocast,
    judge_clipping,
    judge_graph,
    judge_half_weights,
    judge_library_gemm,
    judge_no_waits,
    judge_own_graph,
    judge_scaled_gradients,
    judge_training_step,
    judge_two_buffers,
)
from .checks.shards import judge_shard_selection, judge_shard_values
from .checks.training import judge_step
from .judge import Check

# name, its word in Case.ops, function
CHECKS: list[tuple[str, str, Callable[[Check], None]]] = [
    ("encode_topk global", "encode", partial(judge_encode, topk_type="global")),
    ("encode_topk local", "encode", partial(judge_encode, topk_type="local")),
    ("exact selection", "exact", judge_exact),
    ("values_at", "values", judge_values_at),
    ("decode global", "decode", partial(judge_decode, local=False)),
    ("decode local", "decode", partial(judge_decode, local=True)),
    ("decode_nmse global", "nmse", partial(judge_decode_nmse, local=False)),
    ("decode_nmse local", "nmse", partial(judge_decode_nmse, local=True)),
    ("inverse_index", "index", judge_inverse_index),
    ("latent_reduce", "reduce", judge_latent_reduce),
    ("adam", "reduce", judge_adam),
    ("adam of lists", "reduce", judge_latent_adam),
    ("adam of shards", "reduce", partial(judge_latent_adam, shards=3)),
    ("shard selection", "exact", judge_shard_selection),
    ("shard values", "values", judge_shard_values),
    *((f"auxk_topk {n}", "auxk", partial(judge_auxk_topk, how_many=n)) for n in ("none", "few", "many")),
    ("update_counters_", "counters", judge_update_counters),
    ("training global", "train", partial(judge_step, topk_type="global")),
    ("training local", "train", partial(judge_step, topk_type="local")),
    ("decode int64", "int64", judge_int64_offsets),
    ("two buffers", "beside", judge_two_buffers),
    ("library GEMM", "library", judge_library_gemm),
    ("autocast", "autocast", judge_autocast),
    ("clipping", "clip", judge_clipping),
    ("scaled gradients", "scaled", judge_scaled_gradients),
    ("direct global", "direct", partial(judge_training_step, topk_type="global")),
    ("direct local", "direct", partial(judge_training_step, topk_type="local")),
    ("half weights", "shadow", judge_half_weights),
    ("again global", "again", partial(judge_again, topk_type="global")),
    ("again local", "again", partial(judge_again, topk_type="local")),
    *((f"graph {form}"[:18], "graph", partial(judge_graph, form=form)) for form in FORMS),
    ("own graph fused", "graph", partial(judge_own_graph, gradients=False)),
    ("own graph", "graph", partial(judge_own_graph, gradients=True)),
    ("no waits", "waits", judge_no_waits),
]
