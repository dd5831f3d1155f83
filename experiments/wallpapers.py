"""Photographs of Debian's wallpaper packages, with their authors and licences.

Listed are photographs alone (packages hold drawings and renderings too), each in one size, as the
packages' copyright files credit them. Each licence permits copying and changes with attribution.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.weights.download import Downloads, Unavailable

MIRRORS = (
    "https://deb.debian.org/debian",
    "https://snapshot.debian.org/archive/debian/20261101T000000Z",  # versions since replaced
)
MAGIC = b"!<arch>\n"  # a Debian package is an archive of ar
HEADER = 60  # bytes before each member; its name and size stand at 0 and 48
CC0, BY3, BY4 = "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0"
BY_SA3, BY_SA4 = "CC-BY-SA-3.0", "CC-BY-SA-4.0"
GPL2, LGPL2, LGPL3 = "GPL-2+", "LGPL-2.1+", "LGPL-3"


@dataclass(frozen=True)
class Credit:
    """Photographs of one author under one licence, by their paths below the package's folder."""

    licence: str
    author: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class DebianPackage:
    """One version of a package, and the photographs in it."""

    pool: str  # path below pool/main of a mirror
    sha256: str
    folder: str
    credits: tuple[Credit, ...]

    @property
    def name(self) -> str:
        return PurePosixPath(self.pool).name.partition("_")[0]

    @property
    def version(self) -> str:
        return PurePosixPath(self.pool).name.split("_")[1]

    def photographs(self) -> Iterator[tuple[str, str, Credit]]:
        """Yield name, path within the package and credit of each photograph."""
        for credit in self.credits:
            for file in credit.files:
                own = file.removesuffix("/contents/images/2560x1600.jpg")
                path = PurePosixPath(own)
                stem = path.stem if path.suffix in (".jpg", ".png") else path.name
                yield f"{self.name}-{stem}", f"{self.folder}/{file}", credit


def plasma(*names: str) -> tuple[str, ...]:
    """Files of Plasma's wallpapers, in one of their sizes."""
    return tuple(f"{name}/contents/images/2560x1600.jpg" for name in names)


def jpegs(names: str) -> tuple[str, ...]:
    """Names of JPEG files from their stems."""
    return tuple(f"{name}.jpg" for name in names.split())


PACKAGES = (
    DebianPackage(
        "u/ukui-wallpapers/ukui-wallpapers_20.04.4-1_all.deb",
        "3e9036f3e9fa197e3ff8fc6551eeba208f31ac99cba06da052e49a00d77ed62d",
        "usr/share/backgrounds",
        (
            Credit(
                BY_SA3,
                "Ubuntu Kylin community contributors",
                jpegs(
                    "bluebird bridgecity bridgecity2 flamingos horse house look mountain-range "
                    "mountain mountain2 sea sky snowy-mountains still-life sunf"
                ),
            ),
        ),
    ),
    DebianPackage(
        "b/budgie-backgrounds/budgie-backgrounds_3.0-1_all.deb",
        "b91c2d5209558bc11d8d3a161f22a608857e3f8c735980cfab0d6650b03014ca",
        "usr/share/backgrounds/budgie",
        (
            Credit(
                CC0,
                "Budgie Desktop Developers",
                jpegs(
                    "abstract-spiral beacon-street-sunset blue-periwinkle canyon-wren casa-mila "
                    "extreme-desert-hike high-trestle-trail lake-sherburne oakland-zoo-otters "
                    "perched-osprey piazza-gae-aulenti roman-colosseum singaporean-cityscape "
                    "tea-gardens"
                ),
            ),
        ),
    ),
    DebianPackage(
        "l/lomiri-wallpapers/lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "usr/share/backgrounds",
        (
            Credit(
                BY4,
                "Aitzol Berasategi",
                jpegs(
                    "aitzgorri_by_Aitzol_Berasategi friends_by_Aitzol_Berasategi "
                    "life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
                    "sunset_by_Aitzol_Berasategi"
                ),
            ),
            Credit(
                BY4,
                'Trevor "Freespace"',
                jpegs("Picture_0B_by_freespace Picture_1A_by_freespace"),
            ),
            Credit(BY4, "Jakub Mede", jpegs("Wine_by_Jakkub_Mede")),
            Credit(BY_SA4, "Sander Klootwijk", jpegs("Bridge_by_Sander_Klootwijk")),
            Credit(BY_SA4, "Bolly", jpegs("Dragonfly_by_Bolly")),
            Credit(
                BY_SA4, "Peter Nerlich", jpegs("free_by_Peter_Nerlich greentock_by_Peter_Nerlich")
            ),
            Credit(CC0, "Clemens Engelhardt", jpegs("seeding_by_Clements_Engelhardt")),
        ),
    ),
    DebianPackage(
        "l/lomiri-wallpapers/lomiri-wallpapers-20.04_20.04.0-2_all.deb",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "usr/share/backgrounds",
        (Credit(BY_SA3, "Lukas Baubkus", jpegs("Kleiber_by_Lukas_Baubkus")),),
    ),
    DebianPackage(
        "m/mate-backgrounds/mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "usr/share/backgrounds/mate/nature",
        (
            Credit(GPL2, "Charles Barbin", jpegs("Aqua LadyBird YellowFlower Garden")),
            Credit(GPL2, "Lennart Poettering, Andrea Cimitan", jpegs("Blinds")),
            Credit(GPL2, "Marco Cogoni, Hylke Bons", jpegs("Dune")),
            Credit(GPL2, "Jens Ansorg", jpegs("FreshFlower")),
            Credit(GPL2, "Timothy Schellhase, Lapo Calamandrei", jpegs("GreenMeadow")),
            Credit(GPL2, "blackcombwhistler07", jpegs("RainDrops")),
            Credit(GPL2, "Sergey Nazarov", jpegs("Storm")),
            Credit(GPL2, "Charles Barbin, Hylke Bons", jpegs("TwoWings")),
            Credit(GPL2, "Jean-François Fortin Tam", jpegs("Wood")),
        ),
    ),
    DebianPackage(
        "p/plasma-workspace-wallpapers/plasma-workspace-wallpapers_5.27.5-2_all.deb",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "usr/share/wallpapers",
        (
            Credit(LGPL3, "Maciej Wiklo", plasma("BytheWater")),
            Credit(
                LGPL3,
                "Risto Saukonpää",
                plasma("ColdRipple", "DarkestHour", "Kite", "OneStandsOut", "Path", "summer_1am"),
            ),
            Credit(LGPL3, "Dmitri Popov", plasma("ColorfulCups")),
            Credit(LGPL3, "Ian Hex", plasma("EveningGlow")),
            Credit(LGPL3, "Martin Klapetek", plasma("FallenLeaf")),
            Credit(LGPL3, "Sigi Sagi", plasma("Grey")),
        ),
    ),
    DebianPackage(
        "l/lxqt-themes/lxqt-themes_1.2.0-1_all.deb",
        "d518df36b515b09d36cb00b12645dd8ce170bb82bb0966297741905ce3edc8e1",
        "usr/share/lxqt/wallpapers",
        (
            Credit(
                LGPL2,
                "Razor team, LXQt team",
                (
                    *jpegs("Butterfly-Kenneth-Wimer after-the-rain fog this-is-not-windows"),
                    *("Valendas.png", "appleflower.png", "beam.png", "butterfly.png"),
                    *("cloud.png", "drop.png", "flowers.png"),
                ),
            ),
        ),
    ),
    DebianPackage(
        "p/palapeli/palapeli-data_22.12.3-1_all.deb",
        "69a15dce2ac25ed8708ac518cd0cee5f4eb0c70ed15da2fdb8899a19ac0ee058",
        "usr/share/palapeli/collection",
        (
            Credit(GPL2, "Eric Pouhier", jpegs("castle-maintenon")),
            Credit(GPL2, "Derek Jensen", jpegs("cincinnati-bridge")),
            Credit(GPL2, "US Department of Agriculture", jpegs("citrus-fruits")),
            Credit(GPL2, "John Severns", jpegs("european-honey-bee")),
            Credit(GPL2, "B. Navez and others", jpegs("panther-chameleon-female")),
        ),
    ),
    DebianPackage(
        "g/gnome-backgrounds/gnome-backgrounds_3.38.0-1_all.deb",
        "76d8a4c52e5f346d9cb08bc8a1f58ad443d2bae211721af8a7248457c7a520e8",
        "usr/share/backgrounds/gnome",
        (
            Credit(CC0, "invisiblepower", jpegs("ColdWarm")),
            Credit(CC0, "Joshua Welch", jpegs("Road")),
            Credit(CC0, "Sebastian Voortman", jpegs("SeaSunset")),
            Credit(BY_SA3, "Garrett LeSage", jpegs("Dark_Ivy")),
        ),
    ),
    DebianPackage(
        "s/sddm/sddm-theme-maldives_0.19.0-5_all.deb",
        "d19c0004785df6bccdee3090a0b2cf606fe5dc074183a478bdeb04094ff728e6",
        "usr/share/sddm/themes/maldives",
        (Credit(BY3, "Nevit Dilmen", jpegs("background")),),
    ),
)


def download(package: DebianPackage, downloads: Downloads) -> Path:
    """Download a package from the first mirror that has it."""
    path, reasons = downloads.folder / PurePosixPath(package.pool).name, []
    for mirror in MIRRORS:
        try:
            downloads.get(f"{mirror}/pool/main/{package.pool}", path, package.sha256)
        except Unavailable as error:
            reasons.append(str(error))
        else:
            return path
    raise Unavailable(f"{package.name} cannot be downloaded: {'; '.join(reasons)}")


def read_photographs(package: DebianPackage, path: Path) -> dict[str, bytes]:
    """Read the files of a package's photographs, by name. Raises Unavailable if one is missing."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data_member(path)))) as archive:
        files = {}
        for name, file, _ in package.photographs():
            try:
                member = archive.extractfile(f"./{file}")
            except KeyError:
                member = None
            if member is None:
                raise Unavailable(f"{path.name} does not hold {file}")
            files[name] = member.read()
    return files


def data_member(path: Path) -> bytes:
    """Return data.tar.xz, the compressed files of a Debian package."""
    content = path.read_bytes()
    start = len(MAGIC)
    while content.startswith(MAGIC) and start < len(content):
        name, size = content[start : start + 16], int(content[start + 48 : start + 58])
        start += HEADER
        if name.startswith(b"data.tar.xz"):
            return content[start : start + size]
        start += size + size % 2
    raise Unavailable(f"{path.name} does not hold data.tar.xz")
