"""Checks that the search of the built site answers what users ask, in the words that they type.

    mkdocs build --strict && python docs/check_search.py site

It reads the index that the site's search reads, and ranks the entries in the same spirit: those
that have more of the words come first, then those that have them in the title. An answer must be
among the first three. The words are those of users of Keras, Lightning and Flax.
"""

import html
import json
import re
import sys
from pathlib import Path

FIRST = 3
SEPARATOR = re.compile(r"[\s\-,:!=\[\]()\"`/.?]+")
TAG = re.compile(r"<[^>]+>")

STOP_WORDS = {"a", "and", "do", "from", "how", "i", "in", "of", "on", "or", "out", "the", "to"}

# What a user types, and the beginning of the address that answers it.
QUESTIONS = {
    "train on numpy arrays": "data.html#how-do-i-train-on-numpy",
    "pytorch dataloader": "data.html#how-do-i-train-on-a-pytorch",
    "tf.data dataset": "data.html#how-do-i-train-on-a-pytorch",
    "generator": "data.html#how-do-i-write-a-data-generator",
    "infinite dataset steps_per_epoch": "data.html#how-do-i-train-on-an-endless",
    "last batch smaller drop_last": "data.html#how-do-i-handle-a-last",
    "dict batch": "data.html#how-do-i-use-batches-that-are-dicts",
    "class_weight": "data.html#how-do-i-weight-examples",
    "mask padding": "data.html#how-do-i-mask",
    "data augmentation": "data.html#how-do-i-do-data-aug",
    "validation_split": "data.html#how-do-i-split",
    "dropout batchnorm": "models.html#how-do-i-use-dropout",
    "nnx": "models.html#how-do-i-train-a-flax-nnx",
    "equinox": "models.html#how-do-i-train-an-equinox",
    "fine-tune pretrained": "models.html#how-do-i-fine-tune",
    "transfer learning": "models.html#how-do-i-fine-tune",
    "freeze layers": "models.html#how-do-i-freeze",
    "evaluate on test set": "models.html#how-do-i-evaluate",
    "model summary": "models.html#how-do-i-count",
    "custom loss": "losses.html#how-do-i-write-a-custom-loss",
    "l2 regularization": "losses.html#how-do-i-add-an-l2",
    "vae kl": "losses.html#how-do-i-train-a-vae",
    "multi-task": "losses.html#how-do-i-train-several-tasks",
    "language model": "losses.html#how-do-i-train-a-language",
    "learning rate scheduler": "optimizers.html#how-do-i-use-a-learning-rate-schedule",
    "warmup": "optimizers.html#how-do-i-use-a-learning-rate-schedule",
    "ReduceLROnPlateau": "optimizers.html#how-do-i-reduce",
    "gradient clipping": "optimizers.html#how-do-i-clip",
    "weight decay": "optimizers.html#how-do-i-use-weight-decay",
    "gradient accumulation": "optimizers.html#how-do-i-accumulate",
    "EMA weights": "optimizers.html#how-do-i-keep-an-exponential",
    "mixed precision": "optimizers.html#how-do-i-train-in-mixed",
    "custom metric": "metrics.html#how-do-i-write-a-custom-metric",
    "precision recall": "metrics.html",
    "perplexity": "metrics.html#how-do-i-compute-a-metric-from",
    "log learning rate": "metrics.html#how-do-i-log-the-learning-rate",
    "gradient norm": "metrics.html#how-do-i-log-the-gradient-norm",
    "check_val_every_n_epoch": "metrics.html#how-do-i-validate-every",
    "several validation sets": "metrics.html#how-do-i-validate-on-several",
    "on_epoch_end callback": "handlers.html#how-do-i-run-code-at-the-end",
    "every n steps": "handlers.html#how-do-i-run-code-every",
    "EarlyStopping": "handlers.html#how-do-i-stop-training-early",
    "stop training from callback": "handlers.html#how-do-i-stop-training-from",
    "custom callback": "handlers.html#how-do-i-write-a-custom-callback",
    "save checkpoint": "checkpoints.html#how-do-i-save",
    "ModelCheckpoint best model": "checkpoints.html#how-do-i-save-and-restore-the-best",
    "resume training": "checkpoints.html#how-do-i-save-checkpoints-and-resume",
    "load checkpoint": "checkpoints.html#how-do-i-load",
    "train for more epochs": "checkpoints.html#how-do-i-train-for-more",
    "slurm preemption": "checkpoints.html#how-do-i-survive",
    "save weights": "checkpoints.html#how-do-i",
    "disable output verbose=0": "monitoring.html#how-do-i-turn",
    "history": "monitoring.html#how-do-i-get-the-training-history",
    "TrainState": "flax-projects.html#how-do-i-use-a-flax-trainstate",
    "nnx.Optimizer": "flax-projects.html#how-do-i-use-nnx",
    "custom train_step": "steps.html#how-do-i-write-a-custom",
    "GAN": "steps.html#how-do-i-train-a-gan",
    "max_steps": "steps.html#how-do-i-train-for-n-steps",
    "training is slow": "speed.html#how-do-i-find-out",
    "compilation cache": "speed.html#how-do-i-speed-up",
    "data on gpu": "speed.html#how-do-i-keep-the-data",
    "out of memory": "speed.html#how-do-i-train-with-less",
    "multi gpu": "devices.html#how-do-i-train-on-several",
    "seed reproducible": "devices.html#how-do-i-make",
    "float64": "devices.html#how-do-i-train-in-64",
    "fast_dev_run": "debugging.html#how-do-i",
    "overfit_batches": "debugging.html#how-do-i-overfit",
    "print inside jit": "debugging.html#how-do-i-print",
    "nan loss": "debugging.html#how-do-i-find-and-handle-nan",
    "run_eagerly": "debugging.html#how-do-i-use-a-debugger",
    "unit test": "testing.html#how-do-i-test",
    "colab disconnect": "notebooks.html#how-do-i-resume",
    "tensorboard": "monitoring.html#how-do-i-log-to-tensorboard",
    "wandb weights & biases": "monitoring.html#how-do-i-log-to-weights",
    "mlflow": "monitoring.html#how-do-i-log-to-mlflow",
    "csv logger": "monitoring.html#how-do-i-write-metrics",
    "progress bar": "monitoring.html#how-do-i",
    "predict": "models.html#how-do-i-get-predictions",
    "confusion matrix": "monitoring.html#how-do-i-plot-a-confusion",
    "learning rate finder": "optimizers.html#how-do-i-find-a-good",
    "profiler": "speed.html#how-do-i-profile",
    "safetensors": "checkpoints.html#how-do-i-save-and-load",
    "histogram of weights": "monitoring.html#how-do-i-log-histograms",
    "slack notification": "monitoring.html#how-do-i-get-an-alert",
    "time limit": "checkpoints.html#how-do-i",
    "imbalanced classes sampler": "data.html#how-do-i-balance",
    "plot learning curves": "#how-do-i-plot",
}


def words(text):
    """The set of words of a text, without endings."""
    found = SEPARATOR.split(html.unescape(TAG.sub(" ", text)).lower())
    return {stem(word) for word in found if word and word not in STOP_WORDS}


def stem(word):
    return re.sub(r"(ing|es|s|ed|er|e)$", "", word) if len(word) > 4 else word


def best(index, query):
    """The addresses of the first entries for a query."""

    def score(entry):
        title, text, boost = entry
        in_title, in_text = query & title, query & (title | text)
        return len(in_text), boost * (10 * len(in_title) + len(in_text)), -len(title)

    ranked = sorted(index, key=lambda address: score(index[address]), reverse=True)
    return ranked[:FIRST]


def main(site):
    documents = json.loads(Path(site, "search", "search_index.json").read_text())["docs"]
    index = {
        one["location"]: (words(one["title"]), words(one["text"]), one.get("boost", 1))
        for one in documents
        if "#" in one["location"]
    }
    problems = 0
    for question, answer in QUESTIONS.items():
        found = best(index, words(question))
        if not any(answer in address for address in found):
            problems += 1
            print(f"search: {question!r} should find {answer}, got {', '.join(found)}")
    print(f"search: {len(QUESTIONS) - problems} of {len(QUESTIONS)} questions are answered")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
