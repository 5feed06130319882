"""The server's side of the Flower app: configuration -> strategy -> exported model and report."""

import logging
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbt_app.config import RunConfig
from fedbt_app.errors import FedBTError
from fedbt_app.server.job import Job

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federated job; on a mistake that a person can mend, say it in one line and fail."""
    try:
        run(grid, RunConfig.load(context.run_config))
    except FedBTError as error:
        log.error("fedbt: error: %s", error)
        raise RuntimeError(str(error)) from None  # Flower takes a SystemExit for success


def run(grid: Grid, config: RunConfig) -> dict[str, Any]:
    """Train (or go on where a run stopped), export the model, write the report and return it."""
    return Job(config).run(grid)
