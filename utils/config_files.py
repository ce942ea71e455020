"""Config files: strict JSON, `--set section.key=value`, and errors of one line that name key, value and remedy."""

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from difflib import SequenceMatcher
from os import PathLike
from pathlib import Path

from pydantic import BaseModel, ValidationError

from utils.config import NO_EFFECT, FineTuneConfig
from utils.config_schema import expected, known_keys, leaves, node_at
from utils.files import json_text
