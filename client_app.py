"""The client's side of the Flower app: three messages, each a few lines around fedbt_app.client."""

import logging
import traceback
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedbt_app.client.client import Client
from fedbt_app.errors import FedBTError, without_folders
from fedbt_app.wire.messages import (
    capabilities_message,
    read_request,
    refusal_message,
    reply_message,
)

app = ClientApp()


def answer(message: Message, context: Context, work: Callable[[Client], Message]) -> Message:
    """Do `work`; a failure becomes an answer of one line that carries no local text."""
    try:
        return work(Client(context.run_config, context.node_config))
    except FedBTError as error:
        reason = str(error)
    except Exception as error:  # its own message may quote local text: say only what and where
        origin = traceback.extract_tb(error.__traceback__)[-1]
        file = origin.filename.rsplit("/", 1)[-1]
        reason = f"{type(error).__name__} at {file}:{origin.lineno}"
    logging.getLogger("flwr").error("fedbt: error: %s", reason)
    name = str(context.node_config.get("name", ""))
    return refusal_message(without_folders(reason), message, name)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say what this site has and can."""

    def work(client: Client) -> Message:
        capabilities = client.capabilities(read_request(message))
        return capabilities_message(capabilities, message)

    return answer(message, context, work)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the plan's blocks on the site's rows."""

    def work(client: Client) -> Message:
        reply = client.train(read_request(message))
        return reply_message(reply, message)

    return answer(message, context, work)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on the site's held-out rows."""

    def work(client: Client) -> Message:
        reply = client.evaluate(read_request(message))
        return reply_message(reply, message)

    return answer(message, context, work)
