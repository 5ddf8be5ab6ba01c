"""Put several text files into one, some of them several times.

    python scripts/mix_data.py ../shared/data/train.txt.xz ../shared/data/eval/wikitext2-valid.txt:4 --out mixed.txt

Files are joined by the line that separates documents; training draws windows at random, so order does not matter.
"""

import argparse
import lzma
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE[:TIMES]")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for file in args.files:
            path, _, times = file.partition(":")
            data = Path(path).read_bytes()
            text = (lzma.decompress(data) if path.endswith(".xz") else data).decode().strip()
            out.write(f"{text}\n<|endoftext|>\n" * int(times or 1))


if __name__ == "__main__":
    main()
