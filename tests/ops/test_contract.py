"""What holds for the package as a whole: refusals, registration, reproducible imports."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_process
from common import problem
from conftest import CUDA, DEVICE

import sparc_kernels
import sparc_kernels.nn.optimizer  # registers the optimizer's operators
from sparc_kernels import AlignedSAE, auxk_topk, decode, decode_nmse, encode_topk, update_counters_, values_at
from sparc_kernels.ops.selection import keys_dtype

D = {"image": 20, "text": 13}


def model(**options):
    return AlignedSAE(D, 70, 5, device=DEVICE, **options)


def batch(**changes):
    return {**{s: torch.randn(6, d, device=DEVICE) for s, d in D.items()}, **changes}


def loss(outputs=None, inputs=None, **coefs):
    m, x = model(), batch()
    return m.compute_loss(m(x) if outputs is None else outputs, x if inputs is None else inputs, **coefs)


def load(**changes):
    m = model()
    m.load_state_dict({**m.state_dict(), **changes})


def enc(**changes):
    p = problem(requires_grad=False, dtype=torch.float32)
    args = dict(xs=p.xs, w_encs=p.w_encs, pre_biases=p.pre_biases, latent_biases=p.latent_biases, k=5)
    return encode_topk(**{**args, **changes})


def dec(op=decode, **changes):
    p = problem(requires_grad=False, dtype=torch.float32)
    indices = torch.arange(30, device=DEVICE).reshape(6, 5)
    args = dict(indices=indices, values=torch.rand(3, 6, 5, device=DEVICE), w_decs=p.w_decs, pre_biases=p.pre_biases)
    if op is decode_nmse:
        args["xs"] = p.xs
    return op(**{**args, **changes})


P = problem(requires_grad=False, dtype=torch.float32)
F32 = {"device": DEVICE}
REFUSALS = {
    # constructor
    "no streams": (lambda: AlignedSAE({}, 70, 5), "d_streams: expected a non-empty dict"),
    "streams not a dict": (lambda: AlignedSAE([20, 13], 70, 5), "d_streams: .*got a list"),
    "stream with a dot": (lambda: AlignedSAE({"a.b": 4}, 70, 5), r"d_streams: .*no dot.*got 'a\.b'"),
    "stream named as a module method": (lambda: AlignedSAE({"keys": 4}, 70, 5), "d_streams: .*got 'keys'"),
    "stream without a name": (lambda: AlignedSAE({"": 4}, 70, 5), "d_streams: .*got ''"),
    "nine streams": (lambda: AlignedSAE({f"s{i}": 4 for i in range(9)}, 70, 5), "d_streams: expected at most 8.*got 9"),
    "width zero": (lambda: AlignedSAE({"a": 0}, 70, 5), r"d_streams\['a'\]: expected an int >= 1, got 0"),
    "width a float": (lambda: AlignedSAE({"a": 4.0}, 70, 5), r"d_streams\['a'\]: .*got 4\.0"),
    "colliding names": (
        lambda: AlignedSAE({"a": 4, "a_from_a": 4, "a_from_a_from_a": 4}, 70, 5), "d_streams: .*keys differ",
    ),
    "no latents": (lambda: AlignedSAE(D, 0, 5), "n_latents: expected an int >= 1, got 0"),
    "k zero": (lambda: AlignedSAE(D, 70, 0), r"k: expected an int in 1\.\.70 .*got 0"),
    "k above n_latents": (lambda: AlignedSAE(D, 70, 71), "k: .*got 71"),
    "k above 512": (lambda: AlignedSAE(D, 1000, 513), r"k: expected an int in 1\.\.512 .*got 513"),
    "k a bool": (lambda: AlignedSAE(D, 70, True), "k: .*got True"),
    "auxk above n_latents": (lambda: AlignedSAE(D, 70, 5, auxk=71), "auxk: .*got 71"),
    "auxk negative": (lambda: AlignedSAE(D, 70, 5, auxk=-1), "auxk: .*got -1"),
    "threshold NaN": (lambda: AlignedSAE(D, 70, 5, auxk_threshold=float("nan")), "auxk_threshold: .*got nan"),
    "dead threshold negative": (lambda: AlignedSAE(D, 70, 5, dead_steps_threshold=-1), "dead_steps_threshold: .*got -1"),
    "topk_type unknown": (lambda: model(topk_type="batch"), "topk_type: expected 'global' or 'local', got 'batch'"),
    "impl unknown": (lambda: model(impl="cuda"), "impl: expected one of .*got 'cuda'"),
    "dtype integer": (lambda: model(dtype=torch.int32), "dtype: expected .*got torch.int32"),
    # forward
    "inputs a tensor": (lambda: model()(torch.randn(6, 20)), "inputs: expected a non-empty dict .*got a float32 tensor"),
    "inputs empty": (lambda: model()({}), "inputs: expected a non-empty dict"),
    "unknown stream": (lambda: model()(batch(sound=torch.randn(6, 7))), "inputs: expected streams among .*got 'sound'"),
    "wrong width": (lambda: model()(batch(text=torch.randn(6, 12, **F32))), r"inputs\['text'\]: expected shape \[B, 13\]"),
    "three dimensions": (lambda: model()(batch(text=torch.randn(2, 3, 13, **F32))), r"inputs\['text'\]: .*\(2, 3, 13\)"),
    "rows differ": (lambda: model()(batch(text=torch.randn(5, 13, **F32))), r"inputs\['text'\]: expected 6 rows"),
    "empty batch": (
        lambda: model()({s: torch.randn(0, d, **F32) for s, d in D.items()}), r"inputs\['image'\]: expected at least one",
    ),
    "wrong dtype": (lambda: model()(batch(text=torch.randn(6, 13, **F32).double())), r"inputs\['text'\]: .*float32 as"),
    "integers": (lambda: model()(batch(text=torch.ones(6, 13, **F32).int())), r"inputs\['text'\]: .*got a int32 tensor"),
    "not a tensor": (lambda: model()(batch(text=[[1.0] * 13] * 6)), r"inputs\['text'\]: .*got a list"),
    "other device": (lambda: model()(batch(text=torch.randn(6, 13, device="meta"))), r"inputs\['text'\]: .* on meta"),
    # loss
    "outputs a dict": (lambda: loss(outputs={"recon_image": 1}), "outputs: expected the AlignedOutputs .*got a dict"),
    "outputs of another model": (lambda: loss(outputs=model()(batch())), "outputs: .*another model's outputs"),
    "a stream missing": (lambda: loss(inputs={"text": batch()["text"]}), "inputs: expected all streams"),
    "rows changed": (lambda: loss(inputs={s: torch.randn(5, d, **F32) for s, d in D.items()}), "inputs: expected 6 rows"),
    "negative coefficient": (lambda: loss(cross_loss_coef=-1.0), "cross_loss_coef: .*got -1.0"),
    "NaN coefficient": (lambda: loss(auxk_coef=float("nan")), "auxk_coef: .*got nan"),
    "negative dead threshold": (lambda: model().get_dead_neurons(-1), "threshold: .*got -1"),
    "unknown layout": (lambda: model().decoder_layout_("columns"), "layout: expected 'rows' or 'contiguous'"),
    # operators
    "no tensors": (lambda: enc(xs=[]), "xs: expected a non-empty list"),
    "a tensor for a list": (lambda: enc(xs=P.xs[0]), "xs: expected a non-empty list of tensors"),
    "lists differ": (lambda: enc(w_encs=P.w_encs[:2]), "w_encs: expected 3 tensors"),
    "encoder width": (lambda: enc(w_encs=[P.w_encs[1], *P.w_encs[1:]]), r"w_encs\[0\]: expected shape \[N, 20\]"),
    "encoders differ in N": (lambda: enc(w_encs=[P.w_encs[0], P.w_encs[1][:60], P.w_encs[2]]), r"w_encs\[1\]: .*\[70, 13\]"),
    "bias shape": (lambda: enc(pre_biases=[P.latent_biases[0]] * 3), r"pre_biases\[0\]: expected shape \[20\]"),
    "mixed dtypes": (lambda: enc(xs=[P.xs[0], P.xs[1].double(), P.xs[2]]), r"xs\[1\]: expected dtype float32"),
    "mixed devices": (lambda: enc(xs=[P.xs[0], P.xs[1].to("meta"), P.xs[2]]), r"xs\[1\]: expected a tensor on"),
    "no rows": (lambda: enc(xs=[x[:0] for x in P.xs]), r"xs\[0\]: expected at least one row"),
    "k too large": (lambda: enc(k=71), r"k: expected an int in 1\.\.70"),
    "k a tensor": (lambda: enc(k=torch.tensor(5)), "k: expected an int"),
    "int32 indices": (lambda: dec(indices=torch.zeros(6, 5, dtype=torch.int32, **F32)), "indices: expected an int64"),
    "indices shape": (lambda: dec(indices=torch.zeros(6, 4, dtype=torch.int64, **F32)), r"indices: expected shape \[6, 5\]"),
    "values flat": (lambda: dec(values=torch.rand(6, 5, **F32)), r"values: expected .*\[S, B, k\]"),
    "nine sources": (lambda: dec(values=torch.rand(9, 6, 5, **F32)), r"values: expected 1\.\.8 sources"),
    "decoder bias": (lambda: dec(pre_biases=P.pre_biases[::-1]), r"pre_biases\[0\]: expected shape \[20\]"),
    "decoders transposed": (
        lambda: dec(w_decs=[w.t() for w in P.w_decs]),
        r"w_decs\[0\]: expected \[d, N\] with d 20 as in pre_biases\[0\]",
    ),
    "pairs out of range": (lambda: dec(pairs=[(0, 3)]), r"pairs: .*got \(0, 3\)"),
    "target width": (lambda: dec(decode_nmse, xs=P.xs[::-1]), r"xs\[0\]: expected shape \[6, 20\]"),
    "fewer targets": (lambda: dec(decode_nmse, xs=P.xs[:2]), "xs: expected 3 tensors"),
    "values_at width": (
        lambda: values_at(P.xs[0], P.w_encs[1], P.pre_biases[0], P.latent_biases[0], torch.zeros(6, 5).long()),
        r"w_enc: expected shape \[N, 20\]",
    ),
    "dead not bool": (
        lambda: auxk_topk(P.xs[0], P.w_encs[0], P.pre_biases[0], P.latent_biases[0], torch.zeros(70, **F32), 8),
        r"dead: expected a bool tensor of shape \[70\]",
    ),
    "counters not int64": (
        lambda: update_counters_(torch.zeros(70), torch.zeros(6, 5).long(), torch.zeros(6, 5)), "counters: expected an int64",
    ),
}  # fmt: skip
if not CUDA:  # a range check on the GPU would be a synchronisation: there the result is NaN
    REFUSALS["index out of range"] = (
        lambda: dec(indices=torch.full((6, 5), 70)), r"indices: expected latent ids in 0\.\.69, got 70\.\.70",
    )  # fmt: skip
    REFUSALS["index negative"] = (lambda: dec(indices=torch.full((6, 5), -1)), r"indices: .*got -1\.\.-1")


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_by_name(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("what", ["missing", "shape", "extra"])
def test_load_state_dict_names_what_is_wrong(what):
    m = model()
    state = m.state_dict()
    if what == "missing":
        del state["encoders.text.weight"]
    elif what == "shape":
        state["encoders.text.weight"] = torch.zeros(70, 12)
    else:
        state["encoders.sound.weight"] = torch.zeros(70, 7)
    with pytest.raises(RuntimeError, match="encoders.text.weight" if what != "extra" else "encoders.sound.weight"):
        m.load_state_dict(state)


@pytest.mark.parametrize("bad", [70, -1, 2**40])
def test_kernels_never_read_out_of_bounds(bad):
    """Where the range is not checked first an index outside poisons its row, and only its row."""
    from sparc_kernels.ops.gather import gather_dot, gather_sum

    p = problem(requires_grad=False)
    indices = torch.arange(30, device=DEVICE).reshape(6, 5)
    indices[2, 3] = bad
    values = torch.rand(1, 6, 5, device=DEVICE, dtype=p.xs[0].dtype)
    sums = gather_sum(indices, values, p.w_encs[0], None, False, "triton")[0]
    dots = gather_dot(indices, p.w_encs[0], p.xs[0][None], None, "triton")[0]
    assert sums[2].isnan().all() and sums[[0, 1, 3, 4, 5]].isfinite().all()
    assert dots[2, 3].isnan() and dots.isnan().sum() == 1


B, N, K = 3, 12, 2  # an operator runs some ten times under opcheck, which looks at schemas and not at numbers


def optimizer_operators(p, indices, inverse, values, coef, impl):
    ops, acc = torch.ops.sparc_kernels, p.xs[0].dtype

    def like(t):
        return torch.rand_like(t, memory_format=torch.preserve_format)

    params = [p.w_encs[0], like(p.w_encs[0]), p.pre_biases[0], p.latent_biases[0]]
    grads, ms, vs, adam = (
        [like(t) for t in params],
        [like(t) for t in params],
        [like(t) for t in params],
        (0.9, 0.99, 1e-8),
    )
    scalars = torch.rand(4, 5, device=DEVICE, dtype=acc)
    steps, norm, one = (
        torch.zeros(4, device=DEVICE),
        torch.zeros((), device=DEVICE, dtype=acc),
        torch.ones(1, device=DEVICE),
    )
    errors = torch.stack([p.xs[0]] * 3)
    main = [*inverse, values, coef, None, errors]
    aux = [*inverse, values[:1], None, values[:1], errors[:1]]
    dbias, halves = [like(params[2])], [like(t) for t in params[:2]]
    return {
        "adam_scalars_": (
            ops.adam_scalars_,
            (steps, scalars, None, 0.1, 0.0, 15, None, None, None, None, 0.0, None, 0.9, 0.99, impl),
        ),
        "adam_scalars_ all": (
            ops.adam_scalars_,
            (steps, scalars, norm + 0.1, 0.0, 0.1, 9, one * 0, one, norm + 1, norm + 4, 1.0, norm, 0.9, 0.99, impl),
        ),
        "adam_stream_": (ops.adam_stream_, (params, grads, ms, vs, scalars, 1, *adam, impl)),
        "adam_stream_ some": (ops.adam_stream_, (params, [None, *grads[1:3], None], ms, vs, scalars, 2, *adam, impl)),
        "grad_square": (ops.grad_square, ([params[1]] * 2, [None, *grads[1:], *grads], 1, impl)),
        "latent_adam_": (
            ops.latent_adam_,
            (params, ms, vs, [], scalars, dbias, [], main, main, K, [], [], 0, 1, *adam, impl),
        ),
        "latent_adam_ with auxk": (
            ops.latent_adam_,
            (params, ms, vs, halves, scalars, dbias, [like(params[2])], aux, aux, K, aux, aux, K, 0, *adam, impl),
        ),
    }


def ops_and_arguments(impl):
    p = problem(B, N, (6, 4, 3), requires_grad=False)
    indices = torch.arange(B * K, device=DEVICE).reshape(B, K)
    values = torch.rand(3, B, K, device=DEVICE, dtype=p.xs[0].dtype)
    ops = torch.ops.sparc_kernels
    inverse = [part[0] for part in ops.inverse_index(indices, 1, N, None, impl)]
    out, sums = torch.zeros_like(p.w_encs[0]), torch.zeros_like(p.latent_biases[0])
    stacked, outs, own = torch.stack([p.xs[0]] * 3), [torch.zeros_like(w) for w in p.w_encs[:2]], values[:2, None]
    coef = torch.ones(3, B, device=DEVICE, dtype=out.dtype)
    rows, all_rows = p.w_decs[0].t(), [w.t() for w in p.w_decs]
    grads_of, coefs = (indices, values, all_rows, p.pre_biases, p.xs), torch.stack([coef] * 3)
    dws, own_indices = [torch.zeros_like(w).contiguous() for w in all_rows], torch.stack([indices] * 3)
    own_inverse = ops.inverse_index(own_indices, 3, N, None, impl)
    errors, g, all_errors = (
        [torch.zeros_like(x).expand(*n, -1, -1).contiguous() for x in p.xs] for n in ((), (), (3,))
    )
    counts = torch.full((3,), K, dtype=torch.int32, device=DEVICE)
    ids = torch.arange(N, device=DEVICE, dtype=torch.int32)
    count = torch.tensor(1, dtype=torch.int32, device=DEVICE)
    keys = torch.rand(3, B, K, device=DEVICE, dtype=keys_dtype(out.dtype, impl))
    return {
        "inverse_index": (ops.inverse_index, (indices, 1, N, None, impl)),
        "inverse_index of groups": (
            ops.inverse_index,
            (torch.stack([indices, indices]), 2, N, torch.tensor([1, 0], dtype=torch.int32, device=DEVICE), impl),
        ),
        "dead_first": (ops.dead_first, ([torch.arange(N, device=DEVICE) % 3 == i for i in range(2)], 0, impl)),
        "dead_first by counters": (ops.dead_first, ([torch.arange(N, device=DEVICE) % 3] * 2, 1, impl)),
        "latent_reduce_": (
            ops.latent_reduce_,
            (outs, [sums, sums + 1], *inverse, own, None, own, p.xs[:2], K, False, impl),
        ),
        "latent_reduce_ added": (
            ops.latent_reduce_,
            ([out], [], *inverse, values, coef[None], None, [stacked], K, True, impl),
        ),
        "select": (ops.select, (p.xs, p.w_encs, p.latent_biases, K, None, None, impl)),
        "select dead": (ops.select, (p.xs[:1], p.w_encs[:1], p.latent_biases[:1], K, ids, count, impl)),
        "select_keys": (ops.select_keys, (p.xs[:1], p.w_encs[:1], p.latent_biases[:1], K, ids, count, keys[0], impl)),
        "select_each": (ops.select_each, (p.xs, p.w_encs, p.latent_biases, K, None, None, impl)),
        "select_each dead": (
            ops.select_each,
            (
                p.xs[:2],
                p.w_encs[:2],
                p.latent_biases[:2],
                K,
                torch.stack([ids, ids]),
                torch.stack([count, count]),
                impl,
            ),
        ),
        "select_each_keys": (
            ops.select_each_keys,
            (
                p.xs[:2],
                p.w_encs[:2],
                p.latent_biases[:2],
                K,
                torch.stack([ids, ids]),
                torch.stack([count, count]),
                keys[:2],
                impl,
            ),
        ),
        "topk_positions": (ops.topk_positions, (keys[0], K, impl)),
        "gather_dot": (ops.gather_dot, (indices, p.w_encs[0], p.xs[0][None], None, impl)),
        "gather_dot some": (ops.gather_dot, (indices, p.w_encs[0], p.xs[0][None], count, impl)),
        "gather_sum": (ops.gather_sum, (indices, values, rows, p.pre_biases[0], False, impl)),
        "gather_sum wide": (ops.gather_sum, (indices, values, rows, None, True, impl)),
        "gather_errors": (ops.gather_errors, (indices, values, all_rows, p.pre_biases, p.xs, [], None, impl)),
        "gather_errors own": (
            ops.gather_errors,
            (own_indices, values[:, None], all_rows, p.pre_biases, p.xs, [0, 0, 0], counts, impl),
        ),
        "decode_grads": (
            ops.decode_grads,
            (*grads_of, coefs, *inverse, None, [0, 1, 2], errors, g, torch.zeros_like(values), False, dws, False, impl),
        ),
        "decode_grads added": (
            ops.decode_grads,
            (*grads_of, coefs, *inverse, count, [], [], g, torch.zeros_like(values), True, dws, True, impl),
        ),
        "decode_grads of values": (
            ops.decode_grads,
            (
                *grads_of,
                coefs,
                *inverse,
                None,
                [-2, -2, -2],
                all_errors,
                g,
                torch.zeros_like(values),
                False,
                [],
                False,
                impl,
            ),
        ),
        "decode_grads own": (
            ops.decode_grads,
            (
                own_indices,
                values[:, None],
                *grads_of[2:],
                coefs[:, :1],
                *own_inverse,
                counts,
                [],
                [],
                g,
                torch.zeros_like(values)[:, None],
                False,
                dws,
                True,
                impl,
            ),
        ),
        "residuals": (ops.residuals, (p.pre_biases, p.xs, 0.1, impl)),
        "target_weights": (ops.target_weights, (p.xs, torch.rand(3, 3, device=DEVICE, dtype=out.dtype), impl)),
        "centre": (ops.centre, (p.xs, p.pre_biases, False, impl)),
        "gather_values": (ops.gather_values, (indices, p.xs, p.w_encs, p.latent_biases, None, True, impl)),
        "gather_values some": (
            ops.gather_values,
            (indices, p.xs[:1], p.w_encs[:1], p.latent_biases[:1], count[None], False, impl),
        ),
        "count_fired_": (ops.count_fired_, ([torch.arange(N, device=DEVICE)] * 1, indices, values[:1], 0.5, impl)),
        "loss_terms": (
            ops.loss_terms,
            (coefs, coef + 1, torch.rand_like(coef[:, :3]), values, p.xs, [b.clone() for b in p.pre_biases], impl),
        ),
        "add_auxk": (
            ops.add_auxk,
            (
                coefs[:, :1],
                coef + 1,
                sums[0],
                0.1,
                [coef.clone()],
                [*p.xs, *p.xs],
                [b.clone() for b in p.pre_biases],
                impl,
            ),
        ),
        "pre_bias_grads": (ops.pre_bias_grads, (p.w_encs, p.latent_biases, p.pre_biases, impl)),
        "scale_": (ops.scale_, ([out, sums], torch.full_like(sums[0], 3.0), impl)),
        **optimizer_operators(p, indices, inverse, values, coef, impl),
    }


@pytest.mark.parametrize("name", ops_and_arguments("torch"))
def test_opcheck(impl, name):
    op, args = ops_and_arguments(impl)[name]
    torch.set_deterministic_debug_mode(
        "default"
    )  # opcheck compares runs of its own, poisoned memory is tested elsewhere
    torch.library.opcheck(op.default, args)


def test_every_registered_operator_is_opchecked():
    mine = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("sparc_kernels::")}
    assert mine == {name.split()[0] for name in ops_and_arguments("torch")}


def run_python(code, **env):
    root = Path(__file__).resolve().parents[2]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.subprocess
def test_import_is_light_and_does_not_need_triton():
    done = run_python(
        "import sys, time; t = time.perf_counter(); import sparc_kernels; t = time.perf_counter() - t\n"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
        "t2 = time.perf_counter(); import torch; t2 = time.perf_counter() - t2\n"
        "assert t < t2 / 5, (t, t2)"
    )
    assert done.returncode == 0, done.stderr
    done = warm_process.run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, sparc_kernels\n"
        "m = sparc_kernels.AlignedSAE({'a': 4, 'b': 3}, 9, 2, auxk=2)\n"
        "x = {'a': torch.randn(5, 4), 'b': torch.randn(5, 3)}\n"
        "loss, _ = m.compute_loss(m(x), x); loss.backward(); print(float(loss))\n"
        "try: sparc_kernels.AlignedSAE({'a': 4}, 9, 2, impl='triton')({'a': torch.randn(5, 4)})\n"
        "except ValueError as e: print(e)",
    )
    assert done.returncode == 0, done.stderr
    assert "impl: expected 'torch' or 'auto' because Triton is not installed" in done.stdout


@pytest.mark.subprocess
def test_triton_on_cpu_tensors_is_refused_by_name_without_the_interpreter():
    done = warm_process.run(
        "-c",
        "import torch, sparc_kernels\n"
        "try: sparc_kernels.AlignedSAE({'a': 4}, 9, 2, impl='triton')({'a': torch.randn(5, 4)})\n"
        "except ValueError as e: print(e)",
    )
    assert "impl: expected 'torch' or 'auto' for tensors on cpu" in done.stdout, done.stderr


@pytest.mark.parametrize("name", [n for n in sparc_kernels.__all__ if n not in ("metrics", "data", "__version__")])
def test_public_names_are_documented(name):
    thing = getattr(sparc_kernels, name)
    doc = inspect.getdoc(thing)
    assert doc, name
    if inspect.isfunction(thing):
        assert "Equivalent to" in doc and all(p in doc for p in inspect.signature(thing).parameters), name


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_step_has_no_host_synchronisation_and_captures_into_a_graph():
    m = AlignedSAE(D, 70, 5, auxk=8, device=DEVICE)
    x = batch()

    def step():
        m.zero_grad(set_to_none=True)
        total, _ = m.compute_loss(m(x), x)
        total.backward()
        return total

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    want = step()
    torch.testing.assert_close(captured, want)


class LossOfTensors(torch.nn.Module):
    """docs/integration.md: what make_graphed_callables needs around the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *xs):
        x = dict(zip(self.model.streams, xs, strict=True))
        return self.model.compute_loss(self.model(x), x)[0]


def test_the_shim_for_graphed_callables_is_the_loss():
    m, x = AlignedSAE(D, 70, 5, device=DEVICE), batch()
    m.eval()
    loss = LossOfTensors(m)(*x.values())
    loss.backward()
    assert torch.equal(loss, m.compute_loss(m(x), x)[0]) and all(p.grad is not None for p in m.parameters())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("auxk", [None, 8])
def test_graphed_callables_train_as_eager_does(auxk):
    from copy import deepcopy

    eager = AlignedSAE(D, 70, 5, auxk=auxk, device=DEVICE).eval()  # the counters stay
    model, x = deepcopy(eager), batch()
    graphed = torch.cuda.make_graphed_callables(LossOfTensors(model), tuple(x.values()))
    for factor in (1.0, 0.5):
        for m, loss_of in ((eager, LossOfTensors(eager)), (model, graphed)):
            m.zero_grad()
            (factor * loss_of(*x.values())).backward()
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
