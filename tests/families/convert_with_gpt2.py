"""llama.cpp's converter with GPT-2's vocabulary in Hunyuan's place: `python convert_with_gpt2.py CONVERTER arguments...`

It reads Hunyuan's vocabulary through the tokenizer's own code, which comes with the published model.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    converter = sys.argv[1]
    sys.path.insert(0, str(Path(converter).parent))
    from conversion.hunyuan import HunYuanMoEModel

    HunYuanMoEModel.set_vocab = HunYuanMoEModel._set_vocab_gpt2
    sys.argv = sys.argv[1:]
    runpy.run_path(converter, run_name="__main__")
