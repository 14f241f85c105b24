"""Tokenises a file of JSON lines with datatrove, in one process: `datatrove_tokens.py FILE TOKENIZER OUTPUT`."""

import sys
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(file: Path, tokenizer: str, output: str) -> None:
    reader = JsonlReader(str(file.parent), glob_pattern=file.name)
    writer = DocumentTokenizer(output, tokenizer_name_or_path=tokenizer, shuffle_documents=False)
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=f"{output}.log").run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
