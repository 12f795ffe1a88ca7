# The order of the notebooks, what each needs and what it makes. Everything a rule writes is under runs/<study>/.
#
#   snakemake -n                              what would run now, and why (study phantom)
#   snakemake -n --config study=NAME          the same for another study
#   make report · make study STUDY=NAME       the same rules, checked beforehand and with a lock (see `medaug run`)
#
# A rule runs again when one of these has changed: the notebook's source, a helper that it imports (directly or
# through another helper), a value of its parameters for this study, the weights it starts from, what it reads of an
# earlier notebook or of another study's tables. Products that are not declared here (checkpoints, caches, images) are
# never deleted by Snakemake, so a notebook that was stopped goes on from them.

import os
import sys
from pathlib import Path

from medaug import engine, paths, studies

STUDY = config.get("study", "phantom")
BUNDLE = bool(config.get("bundle", False))  # no shared file system: see profiles/kubernetes/config.yaml
STORY = studies.list_notebooks(STUDY)
ENGINE = studies.resolve_engine(STUDY)
ESTIMATE = studies.estimate_study(STUDY)
RUN = os.path.relpath(paths.run_dir(STUDY)) if paths.run_dir(STUDY).is_relative_to(Path.cwd()) else paths.run_dir(STUDY)

if config.get("data"):
    os.environ["MEDAUG_DATA"] = str(Path(config["data"]).expanduser().resolve())
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # finds `medaug`

# What a notebook reads of earlier ones (one that is not named here: the manifest). 07 reads the merged tables.
UPSTREAM = {
    "00-foundations": [],
    "01-data-audit": [],
    "02-sd-lora": ["00-foundations", "01-data-audit"],
    "03-generation": ["01-data-audit", "02-sd-lora"],
    "04-clip-lora": ["00-foundations", "01-data-audit", "03-generation"],
    "05-baselines": ["01-data-audit", "03-generation"],
    "06-segmentation": ["01-data-audit"],
}
# What others read of a notebook, beside its parts of the tables.
PRODUCTS = {
    "01-data-audit": ["manifest.parquet"],
    "02-sd-lora": ["generator/generator.json"],
    "03-generation": ["synthetic/manifest.parquet"],
}
# Files of the project, beside its code, that a notebook reads.
READS = {
    "07-verdict": ["data/claims.csv"],
}
# The longest chain goes first, and of its end the two longest: 04 beside 05, each on one core, then 06.
PRIORITY = {"00-foundations": 4, "02-sd-lora": 3, "03-generation": 2, "04-clip-lora": 1, "05-baselines": 1}
VERDICT = "07-verdict"
ON_GPU = {name for name in STORY if name not in ("01-data-audit", VERDICT)}


def executed(notebook):
    return f"{RUN}/notebooks/{notebook}.ipynb"


def bundle(step):
    return f"{RUN}/bundles/{step}.tar"


def products(notebook):
    """The files that stand for what `notebook` hands on."""
    if BUNDLE:
        return [bundle(notebook)]
    return [f"{RUN}/{name}" for name in PRODUCTS.get(notebook, [])] or [executed(notebook)]


def upstream(notebook):
    if notebook == VERDICT:
        return [bundle("tables") if BUNDLE else f"{RUN}/tables/.merged", *(products("01-data-audit") if BUNDLE else [])]
    return [file for name in UPSTREAM.get(notebook, ["01-data-audit"]) if name in STORY for file in products(name)]


def sources(files):
    """Files of the project itself: where there is an object store, they are not in it but in the image."""
    return [local(os.path.relpath(file)) for file in files]


def needs_gpu(notebook):
    """A study that asks for cuda gets it (a cluster's login node need not have one); `auto` where there is one."""
    device = studies.resolve_parameters(STUDY, notebook).get("device", "cpu")
    return notebook in ON_GPU and (device.startswith("cuda") or (device == "auto" and engine.count_gpus() > 0))


def wrap(command):
    """Around the command of a step: nothing, or fetch and hand on bundles. `exec`: a kill reaches the notebook."""
    if not BUNDLE:
        return f"exec {command}"
    return f"medaug unpack {STUDY} {{input.upstream}} && {command} && medaug pack {STUDY} {{output.bundle}}"


wildcard_constraints:
    study="[^/]+",


localrules:
    all,
    merge,
    finish,
    site,


rule all:
    input:
        # all products by name: Snakemake lets one that is missing be missing if only later ones are asked for
        dict.fromkeys(file for name in STORY for file in [executed(name), *products(name)]),
        local(f"{RUN}/{engine.SITE}"),


for name in STORY:

    parameters = studies.resolve_parameters(STUDY, name)

    rule:
        name:
            name
        input:
            notebook=sources([paths.NOTEBOOKS / f"{name}.ipynb"]),
            helpers=sources(engine.find_helpers(name)),
            weights=sources(engine.find_weights(parameters)),
            evidence=sources(engine.find_evidence(STUDY, parameters)),
            data=sources([paths.ROOT / file for file in READS.get(name, [])]),
            upstream=upstream(name),
        output:
            notebook=executed(name),
            **({"bundle": bundle(name)} if BUNDLE else {"products": [p for p in products(name) if p != executed(name)]}),
        params:
            # as text, one for each parameter: `snakemake -n` then says which one has changed, and from what
            *[f"{key} = {value!r}" for key, value in sorted(parameters.items())],
        priority: PRIORITY.get(name, 0)
        threads: parameters.get("threads", 1) * parameters.get("processes", 1)
        resources:
            runtime=max(10, int(4 * ESTIMATE[name]["minutes"])),
            **({"gpu": parameters.get("processes", 1)} if needs_gpu(name) else {}),
        retries: ENGINE["retries"]
        shell:
            wrap(f"medaug execute {STUDY} {{rule}}" + (" --output {output.notebook}" if BUNDLE else ""))


rule merge:
    input:
        upstream=[bundle(name) if BUNDLE else executed(name) for name in STORY if name != VERDICT],
    output:
        **({"bundle": bundle("tables")} if BUNDLE else {"done": f"{RUN}/tables/.merged"}),
    shell:
        wrap(f"medaug merge {STUDY}" + ("" if BUNDLE else " --sums {output.done}"))


rule finish:
    input:
        upstream=[bundle(name) if BUNDLE else executed(name) for name in STORY],
    output:
        sums=local(f"{RUN}/SHA256SUMS"),
    shell:
        (f"medaug unpack {STUDY} {{input.upstream}} && " if BUNDLE else "exec ")
        + f"medaug merge {STUDY} --sums {{output.sums}}"


rule site:
    input:
        sums=local(f"{RUN}/SHA256SUMS"),
        notebooks=[executed(name) for name in STORY],
        pages=sources(engine.find_site_sources()),
    output:
        local(f"{RUN}/{engine.SITE}"),
    shell:
        "medaug site --stamp {output}"


onerror:
    print(f"medaug: study '{STUDY}' has stopped. What is done is kept: the same command goes on from here.", file=sys.stderr)
