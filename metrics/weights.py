"""Where the scorers' weights are found, and how they get into their networks."""

import os

from support.errors import UserError, first_line
from support.files import read_tensors
from support.hub import is_offline


def find_repository(weights_dir, repo, *files):
    """The folder with these files of a hub repository: WEIGHTS_DIR/REPO, or the hub's cache, where they are
    fetched to.

    UserError that says which file is missing, and where it was looked for, or that only some are below
    WEIGHTS_DIR: those would not be used."""
    import huggingface_hub

    folder = os.path.join(weights_dir or "", repo)
    present = [file for file in files if weights_dir and os.path.exists(os.path.join(folder, file))]
    missing = [file for file in files if file not in present]
    if not missing:
        return folder
    if present:
        raise UserError(f"--weights-dir: {folder} has {present[0]} and no {missing[0]}: it wants both")
    for file in files:
        try:
            path = huggingface_hub.hf_hub_download(repo, file, local_files_only=is_offline())
        except (OSError, ValueError) as error:
            places = [f"the cache {huggingface_hub.constants.HF_HUB_CACHE}"]
            if weights_dir:
                places.insert(0, os.path.join(folder, file))
            reason = "the hub cannot be reached" if is_offline() else type(error).__name__
            raise UserError(
                f"the file {file} of {repo} is wanted; it is not in {' nor in '.join(places)} and could not "
                f"be fetched ({reason}): put it into DIR/{repo}/ and give --weights-dir DIR"
            ) from error
    return os.path.dirname(path)


def read_weights(path):
    """A checkpoint's state_dict. UserError for a file that is more than tensors, or less."""
    try:
        state = read_tensors(path)
        return state.get("state_dict", state)
    except Exception as error:  # torch.load and safetensors raise many kinds for a damaged file
        raise UserError(f"{path} cannot be read as a file of tensors: {first_line(error)}") from error


def load_weights(module, state, path):
    """Loads a state_dict that has every parameter of the module, and may have more -> the module, frozen.

    UserError, with the path it came from, where a parameter is missing or of another shape."""
    try:
        missing = set(module.load_state_dict(state, strict=False).missing_keys)
    except RuntimeError as error:
        raise report_mismatch(path, error) from error
    missing &= {name for name, _ in module.named_parameters()}
    if missing:
        raise UserError(f"{path} has not all the weights that are wanted: {sorted(missing)[0]} is missing")
    return module.eval().requires_grad_(False)


def report_mismatch(path, error):
    """torch's error for weights of another shape, which has a line for each -> a UserError with the last."""
    return UserError(f"{path} has weights of another model: {str(error).splitlines()[-1].strip()}")
