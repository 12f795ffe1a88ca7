"""The command `medaug`: thin, one function for each word. Heavy imports stand inside, so `medaug check` is quick."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from medaug import engine, paths, studies

EPILOG = """examples:
  medaug studies                     which studies there are
  medaug check guangzhou --data /d   is everything there? (one line if not)
  medaug plan phantom                what would run now and why; minutes, disk, GPU hours
  medaug run phantom --cores 2       run what is missing or stale, then build the site
  medaug run phantom -- --until 02-sd-lora
                                     everything after -- goes to Snakemake (snakemake --help)
  medaug publish phantom             copy a run's tables to data/results/
  medaug audit /my/images            only the audit, of any folder; medaug audit --help
  medaug segment films --model runs/phantom/segmentation/unet.safetensors --output masks
                                     lung masks for a folder of images, each in its image's own size

medaug is research software and no diagnostic device."""

AUDIT = """PATH is
  a folder of class folders          cats/1.png dogs/2.png, also below train/, val/ and test/
  a flat folder, or one image        everything but the search for shortcuts
  a zip, or a folder with zips       unpacked to a temporary folder, safely
  a table (.csv, .parquet)           columns path and label; patient_id and split if known
  a MedMNIST file (.npz)             its images and labels
PNG, JPEG, TIFF, BMP, WebP, GIF and DICOM are read. Every file is accounted for: found = images + failed + others.

what it looks for:
  files that cannot be read, each with its reason; files that are not what their name says
  copies, within and across classes and splits: identical files, identical pictures, near duplicates
  shortcuts: can the class be told from file size and format, brightness, border, or a thumbnail?
  overlap with another set (--against), also where its copies were resized or compressed again

examples:
  medaug audit films/
  medaug audit films/ --html audit.html --json audit.json
  medaug audit mine/ --against public/chest_xray     is my test set in their training set?
  medaug audit films/ --patients '^(P[0-9]+)_'       P017_2.png is an image of patient P017

Nothing is changed and nothing leaves the machine. Measures of each file are kept in --cache, so a second
look takes seconds. The page has no pictures unless you ask for them with --pictures."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code (2 and one line on stderr for an error that the user can mend)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    here = words.index("--") if "--" in words else len(words)
    given = build_parser().parse_args(words[:here])
    given.snakemake = words[here + 1:]
    try:
        return given.command(given) or 0
    except KeyboardInterrupt:  # of a whole run, the Snakefile's `onerror` says it
        return 130
    except (studies.StudyError, engine.NotebookError, RuntimeError, OSError) as error:
        print(f"medaug: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands; each command's function is its default `command`."""
    parser = argparse.ArgumentParser(
        prog="medaug", description=__doc__.splitlines()[0], epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    words = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command, text: str, study: bool = True) -> argparse.ArgumentParser:
        word = words.add_parser(name, help=text, description=text)
        word.set_defaults(command=command)
        if study:
            word.add_argument("study", help="name of a file in studies/, without .yaml")
        return word

    add("studies", show_studies, "List the studies with their one-line descriptions.", study=False)
    for name, command, text in (
            ("check", check, "Check a study file against the notebooks' parameters, and that its data is there."),
            ("plan", plan, "Show what would run now and why, with minutes, disk and GPU hours; runs nothing."),
            ("run", run, "Run what is missing or stale of a study, then build the site.")):
        word = add(name, command, text)
        word.add_argument("--data", default="", help="folder of the images (default: the variable MEDAUG_DATA)")
        if name == "run":
            word.add_argument("--cores", default="", help="CPU cores to use, or 'all' (on this machine: 2 by default)")
            word.add_argument("--profile", default="local", help="local, slurm, kubernetes, or a profile's folder")
            word.epilog = "Everything after -- goes to Snakemake: medaug run phantom --cores 2 -- --until 02-sd-lora"
    word = add("audit", audit, "Audit a folder of images: damaged files, copies, shortcuts, overlap.", study=False)
    word.epilog, word.formatter_class = AUDIT, argparse.RawDescriptionHelpFormatter
    word.add_argument("path", type=Path, metavar="PATH", help="what to audit (see below)")
    word.add_argument("--against", default="", metavar="PATH", help="another set: which of the images are in it too?")
    word.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found")
    word.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no other file")
    word.add_argument("--pictures", action="store_true", help="show small pictures of the pairs on that page")
    word.add_argument("--patients", default="", metavar="REGEX",
                      help="its first group, in a file's name, is the patient (DICOM: taken from the header)")
    word.add_argument("--cache", type=Path, default=paths.RUNS / "audit", metavar="FOLDER",
                      help="where measures are kept (default: runs/audit)")
    word.add_argument("--strict", action="store_true", help="exit with 1 where there is a warning")
    word = add("execute", execute, "Run one notebook of a study now, whatever Snakemake thinks of it.")
    word.add_argument("notebook", help="for example 01-data-audit")
    word.add_argument("--output", type=Path, help="put a second copy here (for an object store)")
    word = add("merge", merge, "Merge the notebooks' parts of the tables into runs/STUDY/tables/.")
    word.add_argument("--sums", type=Path, help="write the tables' SHA-256 sums to this file")
    add("publish", publish, "Copy a run's tables (and figures, if simulated) to data/results/ and figures/.")
    add("fragments", write_fragments, "Write the report's pieces of text from the results tables.", study=False)
    word = add("site", build_site, "Write the fragments and render the site from what has been run.", study=False)
    word.add_argument("--stamp", type=Path, help="write the site's address to this file when it is built")
    word.add_argument("--where", metavar="STUDY", help="only print where the last run of STUDY put the site")
    word = add("strip", strip, "Remove outputs from the notebooks' sources (they must carry none).", study=False)
    word.add_argument("--check", action="store_true", help="change nothing; fail if there are any")
    word = add("segment", segment, "Write a lung mask (PNG, 0 and 255, the image's own size) for every image in a folder.",
               study=False)
    word.add_argument("folder", type=Path, help="folder of images; its sub-folders count too")
    word.add_argument("--model", type=Path, required=True, metavar="FILE",
                      help="weights that 06-segmentation wrote: runs/STUDY/segmentation/NAME.safetensors")
    word.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the masks go")
    word.add_argument("--threshold", type=float, help="probability above which a pixel is lung (default: the run's)")
    for name, command, text in (("pack", pack, "Pack what a step wrote into one file (for an object store)."),
                                ("unpack", unpack, "Unpack what earlier steps packed.")):
        add(name, command, text).add_argument("bundles", nargs="*", type=Path)
    return parser


def show_studies(given: argparse.Namespace) -> None:
    for name in studies.list_studies():
        print(f"{name:18} {studies.load_study(name).get('description', '')}")


def check(given: argparse.Namespace) -> None:
    studies.check_study(given.study, given.data)
    print(f"study '{given.study}' can run: {', '.join(studies.list_notebooks(given.study))}")


def plan(given: argparse.Namespace) -> None:
    studies.check_study(given.study, given.data)
    engine.show_plan(given.study, given.data)


def run(given: argparse.Namespace) -> int:
    studies.check_study(given.study, given.data)
    profile = paths.ROOT / "profiles" / given.profile
    folder = profile if profile.is_dir() else Path(given.profile)
    if not (folder / "config.yaml").is_file():
        known = ", ".join(sorted(path.name for path in (paths.ROOT / "profiles").iterdir()))
        raise FileNotFoundError(f"no profile '{given.profile}': give one of {known}, or a folder with a config.yaml")
    here = given.profile == "local"  # a cluster's profile says how much to ask for
    cores = given.cores or ("2" if here else "")
    options = ["--profile", str(folder), *(["--cores", cores] if cores else [])]
    return engine.run_snakemake(given.study, given.data, options, given.snakemake, quiet=here)


def audit(given: argparse.Namespace) -> int:
    import warnings

    from medaug import folder_audit

    warnings.simplefilter("ignore")  # of decoders, about files: the audit names each file and says what is wrong
    for target in filter(None, (given.json, given.html)):
        if not target.absolute().parent.is_dir():
            raise FileNotFoundError(f"cannot write {target}: there is no folder {target.absolute().parent}")
    try:
        report = folder_audit.audit_path(given.path, given.against, given.cache, given.patients,
                                         threads=min(4, os.cpu_count() or 1), pictures=given.pictures)
    except ValueError as error:
        raise RuntimeError(error) from None
    print(folder_audit.format_summary(report))
    if given.json:
        folder_audit.save_report(report, given.json)
    if given.html:
        given.html.write_text(folder_audit.render_page(report), encoding="utf-8")
    written = " and ".join(str(target) for target in (given.json, given.html) if target)
    print(f"\nwritten: {written}" if written else "")
    return int(given.strict and any(row["status"] == "warning" for row in report["findings"]))


def execute(given: argparse.Namespace) -> None:
    engine.stop_with_parent()
    executed = engine.execute_notebook(given.study, given.notebook)
    if given.output:
        shutil.copyfile(executed, given.output)


def merge(given: argparse.Namespace) -> None:
    from medaug import runtime, tables

    engine.drop_stale_parts(given.study)
    tables.merge_parts(given.study)
    if given.sums:
        with runtime.replace_when_done(given.sums) as temporary:
            temporary.write_text(engine.hash_tables(given.study), encoding="utf-8")


def publish(given: argparse.Namespace) -> None:
    studies.load_study(given.study)
    for path in engine.publish_study(given.study):
        print(os.path.relpath(path, paths.ROOT))


def write_fragments(given: argparse.Namespace) -> None:
    from medaug import report

    report.write_fragments()


def build_site(given: argparse.Namespace) -> None:
    if given.where:
        index = engine.find_site(given.where)
        if index is None:
            raise FileNotFoundError(f"study '{given.where}' has no site yet: run `medaug run {given.where}`")
        print(f"The report is here: {index}")
        return
    from medaug import report, site

    with engine.wait_for_site():
        report.write_fragments()
        index = site.build_site()
    if given.stamp:
        given.stamp.write_text(f"{index}\n", encoding="utf-8")
    else:
        print(f"The report is here: {index}")


def strip(given: argparse.Namespace) -> None:
    dirty = engine.strip_notebooks(write=not given.check)
    if given.check and dirty:
        raise RuntimeError(f"{', '.join(dirty)}: the source carries outputs; remove them with `medaug strip`")


def segment(given: argparse.Namespace) -> None:
    from medaug import images, segmentation, sources

    try:
        network, card = segmentation.load_segmenter(given.model)
        threshold = card["threshold"] if given.threshold is None else given.threshold
        written, unread = segmentation.segment_folder(
            given.folder, given.output, network, image_size=card["image_size"], threshold=threshold,
            open_image=images.open_image, suffixes=sources.SUFFIXES)
    except ValueError as error:  # wrong weights, or masks that would replace the images
        raise RuntimeError(error) from None
    print(f"{written} mask(s) in {given.output}, by {card['architecture']} trained on {card['trained_on']} at "
          f"{card['image_size']} px; research software, no diagnostic device")
    for line in unread:
        print(line, file=sys.stderr)
    if unread:
        raise RuntimeError(f"{len(unread)} image(s) have no mask because they could not be read; they are named above")


def pack(given: argparse.Namespace) -> None:
    engine.pack_run(given.study, given.bundles[0])


def unpack(given: argparse.Namespace) -> None:
    engine.unpack_runs(given.study, given.bundles)


if __name__ == "__main__":
    sys.exit(main())
