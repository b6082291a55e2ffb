"""Record the authors' own training loop and evaluation on the demo's data, for tests/train/test_official_loop.py.

    python tests/scripts/record_official_loop.py --official PATH [--out tests/data/official_loop.npz]

PATH is a clone of github.com/AtlasAnalyticsLab/SPARC. Its `train_loop`, batch sampler, model classes and retrieval run
from there, unchanged, in float64 on the CPU; so do the two functions of its Jaccard notebook. Only numbers reach the
output. Ours are the data set (the official one casts to float32), and empty modules in place of what is imported there
and not needed.

Arrays: train/{stream} [640, d] and test/{stream} [300, d], float16 (every 16-bit float is a 64-bit one); labels, bool
[300, C]; {kind}/loss and {kind}/dead [steps], {kind}/jaccard and {kind}/active [N(, S)]; {kind}/ranks/{name} [300] of
the local selection; meta (JSON: settings).
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import types
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from record_official_replay import load_official
from torch.utils.data import DataLoader, Dataset

from sparc_kernels.data import unicode_streams

SETTINGS = {
    "n_latents": 128, "k": 8, "auxk": 16, "dead_steps_threshold": 30, "batch_size": 60, "epochs": 19, "lr": 2e-3,
    "seed": 42,
}  # fmt: skip
ROWS = 640


class Rows(Dataset):
    """The official data set's arithmetic in float64."""

    def __init__(self, streams):
        self.streams = streams

    def __len__(self):
        return len(next(iter(self.streams.values())))

    def __getitem__(self, i):
        rows = {}
        for s, x in self.streams.items():
            norm = np.linalg.norm(x[i])
            rows[s] = x[i] / (norm + 1e-8) if norm > 0 else x[i]
        return rows


class Recorder:
    """Stands where the official loop reports to wandb."""

    def __init__(self):
        self.loss, self.dead = [], {}

    def log(self, data):
        if "total_loss" in data:
            self.loss.append(data["total_loss"])
        elif "step" in data:
            self.dead[data["step"]] = [v for name, v in data.items() if name.startswith("dead_neurons/")]


def load(root: Path):
    """The official modules, with stand-ins for what they import and do not need here."""
    models = load_official(root)
    sys.modules["sparc.model"].get_sae_model_class = lambda kind: models[kind]
    for name in ("wandb", "sparc.datasets", "sparc.post_analysis", "sparc.evaluation", "sparc.utils",
                 "sparc.evaluation.classification"):  # fmt: skip
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sparc.datasets"].HDF5FeatureDataset = None
    sys.modules["sparc.post_analysis"].HDF5AnalysisResultsDataset = None
    sys.modules["sparc.post_analysis"].get_analysis_results_h5 = None
    sys.modules["sparc.evaluation.classification"].eval_classification = None
    sys.modules["sparc.utils"].seed_worker = sys.modules["sparc.utils"].set_seed = None

    def file(name, path):
        spec = importlib.util.spec_from_file_location(name, root / path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    retrieval = file("sparc.evaluation.retrieval", "sparc/evaluation/retrieval.py")
    return models, file("sparc.train", "sparc/train.py"), file("official_main", "main.py"), retrieval


def notebook(root: Path, labels: np.ndarray) -> dict:
    """The functions of the Jaccard notebook, with the classes as leaves under one root."""
    from itertools import combinations

    from scipy.sparse import csr_matrix
    from tqdm import tqdm

    cells = json.loads((root / "notebooks/quant/t1_jaccard_dead_latents.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "def compute_jaccard_from_counts" in "".join(c["source"]))
    codes = [f"class {i}" for i in range(labels.shape[1])]
    known = {
        "np": np, "json": json, "tqdm": tqdm, "combinations": combinations,
        "taxonomy_json": {"LabelName": "root", "Subcategory": [{"LabelName": c} for c in codes]},
        "dataset": types.SimpleNamespace(label_to_class=dict.fromkeys(codes)),
        "label_matrix_sparse": csr_matrix(labels.astype(int)), "sample_indices": np.arange(len(labels)),
    }  # fmt: skip
    exec(compile(source, "notebook", "exec"), known)
    return known


class Results:
    """As much of the official analysis results as the notebook asks for."""

    def __init__(self, codes):
        self.codes, self.streams = codes, list(codes)

    def get_all_original_dataset_indices(self):
        return np.arange(len(next(iter(self.codes.values()))))

    def get_all_features_for_stream(self, s, kind, return_sparse):
        from scipy.sparse import csr_matrix

        return csr_matrix(self.codes[s])


def encode(model, test):
    """The outputs of the whole test set, as arrays."""
    rows = [Rows(test)[i] for i in range(len(Rows(test)))]
    with torch.no_grad():
        outputs = model.eval()({s: torch.from_numpy(np.stack([row[s] for row in rows])) for s in test})
    return {key: value.numpy() for key, value in outputs.items() if isinstance(value, torch.Tensor)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="root of a clone of the official repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1].joinpath("data", "official_loop.npz"))
    args = parser.parse_args()
    models, training, main_module, retrieval = load(args.official)
    data = unicode_streams(0, quick=True)
    train = {s: x[:ROWS].half().numpy() for s, x in data.train.items()}
    test = {s: x.half().numpy() for s, x in data.test.items()}
    labels = data.test_labels.numpy()
    arrays = {f"train/{s}": x for s, x in train.items()} | {f"test/{s}": x for s, x in test.items()}
    arrays["labels"] = labels
    jaccard = notebook(args.official, labels)
    wide_train, wide_test = ({s: x.astype(np.float64) for s, x in part.items()} for part in (train, test))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    widths = {s: x.shape[1] for s, x in train.items()}
    common = [SETTINGS[name] for name in ("n_latents", "k", "auxk")]

    for kind in ("global", "local"):
        torch.manual_seed(SETTINGS["seed"])  # as the official set_seed
        model = models[kind](widths, *common, dead_steps_threshold=SETTINGS["dead_steps_threshold"])
        loader = DataLoader(
            Rows(wide_train), batch_sampler=main_module.ContiguousRandomBatchSampler(ROWS, SETTINGS["batch_size"]),
            generator=torch.Generator().manual_seed(SETTINGS["seed"]),
        )  # fmt: skip
        recorder = Recorder()
        optimizer = torch.optim.Adam(model.parameters(), lr=SETTINGS["lr"], eps=1e-8)
        training.train_loop(
            model, loader, optimizer, torch.device("cpu"), SETTINGS["epochs"], SETTINGS["dead_steps_threshold"],
            wandb_run=recorder,
        )  # fmt: skip
        arrays[f"{kind}/loss"] = np.array(recorder.loss)
        arrays[f"{kind}/dead"] = np.array([recorder.dead.get(i, [0] * len(widths)) for i in range(len(recorder.loss))])
        outputs = encode(model, wide_test)
        counts, active, _ = jaccard["_build_counts_matrix"](Results({s: outputs[f"sparse_codes_{s}"] for s in widths}))
        arrays[f"{kind}/jaccard"] = jaccard["compute_jaccard_from_counts"](counts, active, 1)
        arrays[f"{kind}/active"] = active
        local = models["local"](widths, *common)
        local.load_state_dict(model.state_dict())
        outputs = encode(local, wide_test)
        queries = {f"latent {t}<-{s}": (f"sparse_codes_{s}", f"sparse_codes_{t}") for s, t in permutations(widths, 2)}
        queries |= {f"cross {t}<-{s}": (f"cross_recon_{t}_from_{s}", f"raw {t}") for s, t in permutations(widths, 2)}
        queries |= {f"self {s}<-{s}": (f"recon_{s}", f"raw {s}") for s in widths}
        outputs |= {f"raw {s}": np.stack([Rows(wide_test)[i][s] for i in range(len(test[s]))]) for s in widths}
        for name, (query, target) in queries.items():
            ranked = retrieval.run_downstream_retrieval_eval(outputs[query], outputs[target], return_ranks=True)
            arrays[f"{kind}/ranks/{name}"] = ranked["ranks"].numpy().astype(np.int16)
        steps = len(recorder.loss)
        dead, score = sum(map(sum, recorder.dead.values())), arrays[f"{kind}/jaccard"].mean()
        print(f"{kind}: {steps} steps, loss {recorder.loss[-1]:.4f}, reinitialised {dead}, Jaccard {score:.4f}")

    head = subprocess.run(["git", "-C", str(args.official), "rev-parse", "HEAD"], capture_output=True, text=True)
    source = {"source": "github.com/AtlasAnalyticsLab/SPARC", "commit": head.stdout.strip(), "torch": torch.__version__}
    arrays["meta"] = np.array(json.dumps(SETTINGS | source))
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out} {args.out.stat().st_size / 1e6:.2f} MB, {len(arrays)} arrays")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
