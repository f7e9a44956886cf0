"""Make our own tokenizer: ``python -m rlroute.training.train_tokenizer [FILE]``, the same bytes every time.

Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; on bytes as GPT-2) of the default corpus' training documents:
what is held out for validation is not looked at.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlroute.config import DataConfig
from rlroute.records import write_atomically
from rlroute.training.data import read_documents
from rlroute.training.documents import Document, split_documents
from rlroute.training.tokenizer import BPE_FILE
from rlroute.training.tokenizer_file import byte_alphabet

ENTRIES = 2048
"""BOS included. Of 1,024, 2,048 and 4,096 the one with the fewest bits per byte in twenty seconds of training."""


def train_tokenizer(documents: Sequence[Document], entries: int = ENTRIES) -> str:
    """Return the tokenizer file that the documents give: no normalizer, no prefix space, all 256 bytes, no special
    token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries - 1, initial_alphabet=sorted(byte_alphabet()), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator((document.data.decode() for document in documents), trainer)
    return _to_json(json.loads(tokenizer.to_str()))


def _to_json(said: dict[str, Any]) -> str:
    """Return the file's text, one merge a line, whatever the library's release writes besides."""
    kept = {name: said[name] for name in ("version", "added_tokens", "normalizer", "pre_tokenizer", "decoder")}
    model = said["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    kept["model"] = {"type": "BPE", "vocab": vocab, "merges": pairs}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":")).replace('],["', '],\n["') + "\n"


def main() -> None:
    """Write the file; said to be our own where none is named."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else BPE_FILE
    spec = DataConfig().spec
    train = split_documents(spec, read_documents(spec)).train
    write_atomically(path, train_tokenizer(train))
    print(f"{path}: {ENTRIES} entries from {len(train)} documents of {spec}")


if __name__ == "__main__":
    main()
