"""Recorded digits, letters and dates of a Debian package, as NeMo manifests: ``python recipes/nemo_asr/prepare.py [--out ...]``.

The recordings are those of ``asterisk-core-sounds-en-wav`` (8 kHz, one voice, CC-BY-SA): installed once with apt-get, no download.
What is said follows from the file's name. One in eight is kept for validation. Needs the standard library only.
"""

import argparse
import json
import os
import sys
import wave
from pathlib import Path

PACKAGE = "asterisk-core-sounds-en-wav"
SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
OUT = Path("outputs/nemo_asr")
_VALIDATE_EVERY = 8
_NUMBERED = (
    ("digits/{}", range(20), "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
     "seventeen eighteen nineteen"),
    ("digits/{}", range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety"),
    ("digits/h-{}", range(1, 20), "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
     "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"),
    ("digits/h-{}", range(20, 100, 10), "twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth ninetieth"),
    ("digits/day-{}", range(7), "sunday monday tuesday wednesday thursday friday saturday"),
    ("digits/mon-{}", range(12), "january february march april may june july august september october november december"),
)  # fmt: skip
_NAMED = (
    ("digits/{}", "billion dollars hundred million minus pound star thousand today tomorrow yesterday"),
    ("letters/{}", "a b c d e f g h i j k l m n o p q r s t u v w x y z"),
)
_PHONETIC = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo sierra tango uniform "
    "victor whiskey x-ray yankee zulu"
)


def transcripts() -> dict[str, str]:
    """Recording, without its folder's root and suffix -> what is said in it."""
    said = {name.format(number): word for name, numbers, words in _NUMBERED for number, word in zip(numbers, words.split(), strict=True)}
    said |= {name.format(word): word for name, words in _NAMED for word in words.split()}
    return said | {f"phonetic/{word[0]}_p": word.replace("-", " ") for word in _PHONETIC.split()}


def entries(sounds: Path) -> list[dict[str, object]]:
    """One for each recording; `ValueError` names those that are missing."""
    said = transcripts()
    missing = [name for name in said if not (sounds / f"{name}.wav").is_file()]
    if missing:
        raise ValueError(
            f"--sounds={str(sounds)!r} lacks {len(missing)} of {len(said)} recordings, the first is {missing[0]}.wav: "
            f"apt-get install {PACKAGE}, or give the folder of its sounds"
        )
    return [_entry(sounds / f"{name}.wav", text) for name, text in said.items()]


def _entry(file: Path, text: str) -> dict[str, object]:
    try:
        with wave.open(str(file)) as recording:
            duration = recording.getnframes() / recording.getframerate()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{str(file)!r} is no WAV file ({error}): apt-get install --reinstall {PACKAGE}") from None
    return {"audio_filepath": str(file.resolve()), "duration": round(duration, 4), "text": text}


def prepare(sounds: Path, out: Path) -> tuple[int, int]:
    """Write ``train.json`` and ``validation.json``; returns how many recordings each has."""
    found = entries(sounds)
    validation = found[::_VALIDATE_EVERY]
    train = [entry for number, entry in enumerate(found) if number % _VALIDATE_EVERY]
    _write(out / "train.json", train)
    _write(out / "validation.json", validation)
    return len(train), len(validation)


def _write(path: Path, entries: list[dict[str, object]]) -> None:
    """Write a manifest; nobody ever sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    os.replace(part, path)


def main() -> int:
    """Exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--sounds", type=Path, default=SOUNDS, help=f"folder of the recordings (default: {SOUNDS})")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the manifests (default: {OUT})")
    options = parser.parse_args()
    try:
        train, validation = prepare(options.sounds, options.out)
    except (ValueError, OSError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}/train.json: {train} recordings, {options.out}/validation.json: {validation}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
