"""Published models, in the files of Hugging Face `transformers`: config.json and safetensors; LoRA in those of `peft`.

`families` has one table a family, which reading (`published`) and writing (`export`) both follow. `files` opens a
folder, which is not trusted.
"""

from lm.checkpoint.hf.adapter import adopt as adopt_adapter
from lm.checkpoint.hf.families import FAMILIES, adopt, adopt_task
from lm.checkpoint.hf.published import PREFIX, Published, functions, load, open_model
