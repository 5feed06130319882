"""Who is not let in, or not used: a wrong certificate, an unknown key, another base, a delta that is no number."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deployment.federation import DEPLOY, Federation

pytestmark = pytest.mark.timeout(1800)
Observe = Callable[..., None]


def test_a_node_with_another_ca_or_an_unknown_key_stays_outside_and_the_run_goes_on(
    federation: Federation, observe: Observe, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    subprocess.run(
        [DEPLOY / "make_certs.sh", "bob"], env=os.environ | {"CERTS": str(foreign)}, check=True
    )
    federation.node("alice")
    deceived = federation.node("bob", "--max-retries", "2", CERTS=str(foreign))
    unknown = federation.node("stranger", "--max-retries", "2")
    done = federation.submit(num_rounds=1, min_clients=1).finish()
    assert done.status == 0, done.log
    assert done.clients == [1]
    assert done.refused == []
    for node in (deceived, unknown):
        assert node.process.wait(120) != 0
    certificate = next(
        line for line in deceived.text().splitlines() if "CERTIFICATE_VERIFY_FAILED" in line
    )
    refusal = next(
        line for line in unknown.text().splitlines() if "Failed to activate SuperNode" in line
    )
    observe(
        "node with a wrong certificate", "never connects; the run goes on without it", certificate
    )
    observe("node with an unregistered key", "never connects; the run goes on without it", refusal)


@pytest.mark.slow
def test_a_node_with_another_base_is_left_out_with_the_reason(
    federation: Federation, observe: Observe, tiny_bert: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other-bert")
    save_file({name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()},
              other / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    federation.node("alice")
    federation.node("bob", settings=f"model-path='{other}'")
    done = federation.submit(num_rounds=2).finish()
    assert done.status == 0, done.log
    assert done.clients == [1, 1]
    assert [round_ for round_, _ in done.refused] == [0]
    observe(
        "node with a wrong base model",
        "left out of the run; the others go on",
        done.line("another base", "bob"),
    )


TAMPERED = """
import sys
from importlib.util import find_spec

def not_a_number(module):  # what training makes
    deltas = module.LocalModel.deltas

    def broken(self, weights):
        for part, tensors in deltas(self, weights):
            yield part, {{name: value * float("nan") for name, value in tensors.items()}}

    module.LocalModel.deltas = broken

def unchecked(module):  # lets NaN out, as an app of another make would
    for check in {{"_check_range", "_check_finite"}} & vars(module).keys():
        setattr(module, check, lambda *arguments: None)

class Tamper:
    patches = {patches}

    def find_spec(self, name, path=None, target=None):
        patch = self.patches.pop(name, None)
        if patch is None:
            return None
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def patched(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Tamper())
"""


def tampered(folder: Path, patches: str) -> str:
    """Return a PYTHONPATH with which the client app's modules are patched as they are imported."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(TAMPERED.format(patches=patches))
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.slow
def test_a_delta_that_is_not_finite_is_not_used(
    federation: Federation, observe: Observe, tmp_path: Path
) -> None:
    broken = "'fedbt_app.model.local_model': not_a_number"
    federation.node("alice")
    honest = federation.node("bob", PYTHONPATH=tampered(tmp_path / "broken", f"{{{broken}}}"))
    unchecked = (
        f"{{{broken}, 'fedbt_app.codec.codec': unchecked, 'fedbt_app.client.client': unchecked}}"
    )
    sent = federation.node("carol", PYTHONPATH=tampered(tmp_path / "unchecked", unchecked))
    done = federation.submit(num_rounds=1, min_clients=3).finish()
    assert done.status == 0, done.log
    assert done.clients == [1]
    assert sorted(done.refused) == [(1, "bob"), (1, "carol")]
    assert all(bool(tensor.isfinite().all()) for tensor in done.model().values())
    line = done.line("round 1:", "carol")
    assert "fedbt: error" in honest.text()
    assert "fedbt: error" not in sent.text()  # its NaN went out, and the server saw it
    observe(
        "message from a node with a NaN delta",
        "dropped; an honest client does not even send one",
        line,
    )
