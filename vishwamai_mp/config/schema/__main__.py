"""Prints the JSON schema of a recipe, for editors that complete and check YAML.

python -m vishwamai_mp.config.schema > recipe.schema.json
"""

import json

from vishwamai_mp.config.errors import run_program
from vishwamai_mp.config.schema.json_schema import json_schema


def main() -> None:
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run_program(main)
