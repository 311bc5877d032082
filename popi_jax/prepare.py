"""Reads and checks the data of a configuration, writes the prepared copy for training and prints
what is in it."""

import json
import os
from typing import Any

from absl import flags

from popi_jax import cli
from popi_jax.config import Config
from popi_jax.errors import UserError

_USERS = flags.DEFINE_integer("users", 1, "how many users to print, of each split that has some")


def main(config: Config) -> None:
    from popi_jax import distributed
    from popi_jax.data import overview
    from popi_jax.data.prepared import prepare

    if _USERS.value < 0:
        raise UserError(f"--users={_USERS.value}: must be at least 0")
    dataset = prepare(config.data, allow_sample=distributed.is_alone_on_cpu(os.environ))
    print(overview.describe(dataset, config, _load_tokenizer(config, dataset)))
    for users in dataset.splits.values():
        for user in users[: _USERS.value]:
            print(f"\n{overview.show_user(user, config)}")


def _load_tokenizer(config: Config, dataset: Any) -> Any:
    """That of the base model; without one, a tokenizer trained on some of the users."""
    from popi_jax.checkpoints import hub
    from popi_jax.data import overview, prompts, tokenizer

    if config.model.checkpoint:
        folder = hub.open_base(config.model.checkpoint).folder
        args = json.loads(config.model.template_args or "{}")
        system_role = config.model.summary_place == "system"
        return tokenizer.load(folder, args, system_role=system_role)
    users = dataset.splits["train"]
    stride = max(-(-len(users) // overview.MEASURED), 1)
    some = (users[i] for i in range(0, len(users), stride))
    return tokenizer.train(prompts.list_training_texts(some, config), config.model.vocab_size)


if __name__ == "__main__":
    cli.run(
        main, description=__doc__, example="python -m popi_jax.prepare --config=prefeval --users=3"
    )
