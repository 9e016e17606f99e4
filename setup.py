"""The description of the wheel: the README, whose links and figures of the checkout do not exist on a package index."""

import re
from pathlib import Path

from setuptools import setup

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n+\*[^*]*\*\n+", "", text)  # a figure and its caption
text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)
setup(long_description=text, long_description_content_type="text/markdown")
