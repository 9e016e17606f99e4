"""python -m tools.cases FOLDER ...: convert every case of version 2 below the folders, in place."""

import json
import sys
from pathlib import Path

from . import FORM, parity, recipe

for root in sys.argv[1:]:
    for path in sorted(Path(root).glob("*/*/case.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("form") == FORM:
            continue
        is_recipe = "expected" in json.loads(path.read_text(encoding="utf-8")) and "settings" in path.read_text()
        made = (recipe if is_recipe else parity)(path.parents[1].name, path.parent)
        path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)
