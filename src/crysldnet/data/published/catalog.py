"""The published data sets, each defined in one place: files, version, checksums, licence, citation, properties, splits.

A sha256 stands here only where a public, versioned source states it: the metadata of matminer and of matbench, which
come from PyPI. ``None`` means that none could be verified; ``crysldnet data download`` then prints the one it got.
"""

from __future__ import annotations

from difflib import get_close_matches

from crysldnet.data.published.definition import File, Property, PublishedSet, Sizes
from crysldnet.errors import DataError

FIGSHARE = "https://ndownloader.figshare.com/files/"
CDVAE = "https://raw.githubusercontent.com/txie-93/cdvae/main/data/mp_20/"
JAIN = "A. Jain et al., APL Materials 1, 011002 (2013), doi:10.1063/1.4812323"
CHOUDHARY = "K. Choudhary et al., npj Comput. Mater. 6, 173 (2020), doi:10.1038/s41524-020-00440-1"
DUNN = "A. Dunn et al., npj Comput. Mater. 6, 138 (2020), doi:10.1038/s41524-020-00406-3"
TENTHS = (0.1, 0.1)


def _jarvis() -> PublishedSet:
    def property_(name: str, unit: str, sizes: tuple[int, int, int] | None = None) -> Property:
        known = None if sizes is None else Sizes(train=sizes[0], val=sizes[1], test=sizes[2])
        return Property(name=name, key=name, unit=unit, fractions=TENTHS, sizes=known)

    everything = (44_578, 5_572, 5_572)
    return PublishedSet(
        name="jarvis_dft_3d",
        title="JARVIS-DFT, 3D (dft_3d)",
        version="2021.8.18",
        entries=55_722,
        reader="jarvis",
        files=(File(name="jdft_3d-8-18-2021.json.zip", url=f"{FIGSHARE}29204826"),),
        properties=(
            property_("formation_energy_peratom", "eV/atom", everything),
            property_("optb88vdw_bandgap", "eV", everything),
            property_("optb88vdw_total_energy", "eV/atom", everything),
            property_("ehull", "eV/atom", (44_296, 5_537, 5_537)),
            property_("mbj_bandgap", "eV", (14_537, 1_817, 1_817)),
            property_("bulk_modulus_kv", "GPa"),
            property_("shear_modulus_gv", "GPa"),
            property_("slme", "%"),
            property_("spillage", "1"),
        ),
        licence="NIST, public domain in the US",
        citation=CHOUDHARY,
        splits=(
            "of each property: the rows with a value in the file's order, shuffled by random.seed(123); the last 10 % "
            "are test, the 10 % before them validation, the rest training"
        ),
        caveat="no checksum is published; the sizes of the splits of moduli, SLME and spillage are not stated here",
    )


def _megnet() -> PublishedSet:
    energies = Sizes(train=60_000, val=5_000, test=4_239)
    return PublishedSet(
        name="megnet",
        title="Materials Project as in MEGNet",
        version="2018.6.1",
        entries=69_239,
        reader="megnet",
        files=(
            File(name="megnet.json.zip", url=f"{FIGSHARE}26724977"),
            File(name="mp.2018.6.1.json.zip", url=f"{FIGSHARE}15087992"),
        ),
        properties=(
            Property(name="formation_energy_per_atom", key="e_form", unit="eV/atom", sizes=energies),
            Property(name="band_gap", key="gap pbe", unit="eV", sizes=energies),
            Property(
                name="log10_bulk_modulus",
                key="K",
                unit="log10(GPa)",
                log10=True,
                sizes=Sizes(train=4_664, val=393, test=393),
            ),
            Property(
                name="log10_shear_modulus",
                key="G",
                unit="log10(GPa)",
                log10=True,
                sizes=Sizes(train=4_664, val=392, test=393),
            ),
        ),
        licence="Materials Project, CC BY 4.0",
        citation=f"C. Chen et al., Chem. Mater. 31, 3564 (2019), doi:10.1021/acs.chemmater.9b01294; {JAIN}",
        splits=(
            "of each property: the rows with a value in the file's order, shuffled by random.seed(123), cut at the "
            "published sizes; the rows of the moduli are not the published ones, which exist as pickle files only"
        ),
        caveat="no checksums are published; that the moduli are called K and G in the second file is not verified",
    )


def _mp_20() -> PublishedSet:
    return PublishedSet(
        name="mp_20",
        title="MP-20 (CDVAE)",
        version="main of the repository",
        entries=45_231,
        reader="cif_table",
        files=tuple(File(name=f"{s}.csv", url=f"{CDVAE}{s}.csv", split=s) for s in ("train", "val", "test")),
        properties=(
            Property(name="formation_energy_per_atom", key="formation_energy_per_atom", unit="eV/atom"),
            Property(name="band_gap", key="band_gap", unit="eV"),
            Property(name="e_above_hull", key="e_above_hull", unit="eV/atom"),
        ),
        licence="Materials Project, CC BY 4.0; the code is MIT",
        citation=f"T. Xie et al., ICLR 2022, arXiv 2110.06197; {JAIN}",
        splits="the three files, in the column split",
        caveat="no checksums are published",
    )


def _gnome() -> PublishedSet:
    return PublishedSet(
        name="gnome",
        title="GNoME, stable crystals",
        version="the public bucket, undated",
        entries=381_000,
        reader="zip_of_cifs",
        files=(
            File(name="by_id.zip", url="https://storage.googleapis.com/gdm_materials_discovery/gnome_data/by_id.zip"),
        ),
        licence="CC BY-NC 4.0",
        citation="A. Merchant et al., Nature 624, 80 (2023), doi:10.1038/s41586-023-06735-9",
        caveat=(
            "no checksum is published, and the bucket changes (since August 2024 it has over 520,000 crystals): keep "
            "the sha256 that you got; 381,000 is rounded"
        ),
    )


def _oqmd() -> PublishedSet:
    return PublishedSet(
        name="oqmd",
        title="OQMD, as JARVIS-Tools distributes it",
        version="oqmd_3d_no_cfid",
        entries=800_000,
        reader="jarvis",
        files=(File(name="all_oqmd.json.zip", url=f"{FIGSHARE}26790182"),),
        licence="OQMD, CC BY 4.0",
        citation="S. Kirklin et al., npj Comput. Mater. 1, 15010 (2015), doi:10.1038/npjcompumats.2015.10",
        caveat="no checksum is published; 800,000 is rounded; structures only",
    )


def _alexandria() -> PublishedSet:
    return PublishedSet(
        name="alexandria",
        title="Alexandria, PBE, on the convex hull",
        version="2023.12.29",
        entries=116_000,
        reader="jarvis",
        files=(File(name="alexandria_convex_hull_pbe_2023.12.29_jarvis_tools.json.zip", url=f"{FIGSHARE}49622718"),),
        licence="CC BY 4.0",
        citation="J. Schmidt et al., Adv. Mater. 35, 2210788 (2023), doi:10.1002/adma.202210788",
        caveat="no checksum is published; 116,000 is rounded; structures only",
    )


def _lemat_bulk() -> PublishedSet:
    return PublishedSet(
        name="lemat_bulk",
        title="LeMat-Bulk, compatible_pbe",
        version="the folder compatible_pbe",
        entries=5_300_000,
        reader="optimade_parquet",
        files=(
            File(
                name="*.parquet",
                url="https://huggingface.co/datasets/LeMaterial/LeMat-Bulk/tree/main/compatible_pbe",
                manual=True,
            ),
        ),
        licence="CC BY 4.0",
        citation="LeMaterial, LeMat-Bulk (2024), https://huggingface.co/datasets/LeMaterial/LeMat-Bulk",
        caveat="number and names of its files change with each version; the number of entries is not verified",
    )


def _mptrj() -> PublishedSet:
    return PublishedSet(
        name="mptrj",
        title="Materials Project Trajectories (MPtrj)",
        version="2022.9",
        entries=1_580_395,
        reader="mptrj",
        files=(File(name="MPtrj_2022.9_full.json", url="https://figshare.com/ndownloader/files/41619375"),),
        properties=(Property(name="energy_per_atom", key="energy_per_atom", unit="eV/atom"),),
        licence="MIT",
        citation="B. Deng et al., Nat. Mach. Intell. 5, 1031 (2023), doi:10.1038/s42256-023-00716-3",
        caveat="every frame is a row, so a random split is no test; no checksum is published; 11 GB",
    )


def _expt_kingsbury() -> PublishedSet:
    return PublishedSet(
        name="expt_kingsbury",
        title="Experimental formation enthalpies (Kingsbury)",
        version="figshare 28232538",
        entries=2_135,
        reader="pandas_by_id",
        files=(
            File(
                name="expt_formation_enthalpy_kingsbury.json.gz",
                url=f"{FIGSHARE}28232538",
                sha256="a2d2ced98d40349abd2041f169d9ed9c7f49453e86a77f82cab8c61c70dcb7ca",
            ),
        ),
        properties=(
            Property(name="expt_formation_enthalpy_per_atom", key="expt_form_e", unit="eV/atom"),
            Property(name="uncertainty", key="uncertainty", unit="eV/atom"),
        ),
        licence="CC BY 4.0 (figshare)",
        citation="A. Wang, R. Kingsbury et al., Sci. Rep. 11, 15496 (2021), doi:10.1038/s41598-021-94550-5",
        caveat="measured at 298 K; structures are joined by likely_mpid",
        needs_structures=True,
    )


def _expt_kim() -> PublishedSet:
    return PublishedSet(
        name="expt_kim",
        title="Experimental formation enthalpies (Kim 2017)",
        version="figshare 13464467",
        entries=1_276,
        reader="pandas_by_id",
        files=(
            File(
                name="expt_formation_enthalpy.json.gz",
                url=f"{FIGSHARE}13464467",
                sha256="cb0e1bba0de70ca977a3a6b3c0020cc986fe32affc90fc36752beb61aaf6f5b4",
            ),
        ),
        properties=(
            Property(name="expt_formation_enthalpy_per_atom", key="e_form expt", unit="eV/atom"),
            Property(name="dft_formation_energy_per_atom", key="e_form mp", unit="eV/atom"),
        ),
        licence="CC BY 4.0 (figshare)",
        citation="G. Kim et al., Sci. Data 4, 170162 (2017), doi:10.1038/sdata.2017.162",
        caveat="structures are joined by mpid",
        needs_structures=True,
    )


_MATBENCH = (
    ("matbench_dielectric", 4_764, "n", "1", "83befa09bc2ec2f4b6143afc413157827a90e5e2e42c1eb507ccfa01bf26a1d6"),
    (
        "matbench_jdft2d",
        636,
        "exfoliation_en",
        "meV/atom",
        "26057dc4524e193e32abffb296ce819b58b6e11d1278cae329a2f97817a4eddf",
    ),
    (
        "matbench_log_gvrh",
        10_987,
        "log10(G_VRH)",
        "log10(GPa)",
        "098af941f4c663270f1fe21abf20ffad6fb85ecbfcba5786ceac03983ac29da7",
    ),
    (
        "matbench_log_kvrh",
        10_987,
        "log10(K_VRH)",
        "log10(GPa)",
        "44b113ddb7e23aa18731a62c74afa7e5aa654199e0db5f951c8248a00955c9cd",
    ),
    (
        "matbench_mp_e_form",
        132_752,
        "e_form",
        "eV/atom",
        "dedcb1d4ba2e3e50dbdd45ba5bc647a00e9c2bcf8f8bf556dc8e92caa39eb21f",
    ),
    ("matbench_mp_gap", 106_113, "gap pbe", "eV", "58b65746bd88329986ed66031a2ac1369c7c522f7bc9f9081528e07097c2c057"),
    (
        "matbench_perovskites",
        18_928,
        "e_form",
        "eV/unit cell",
        "4641e2417f8ec8b50096d2230864468dfa08278dc9d257c327f65d0305278483",
    ),
    (
        "matbench_phonons",
        1_265,
        "last phdos peak",
        "1/cm",
        "4db551f21ec5f577e6202725f10e34dfc509aa7df3a6bdaac497da7f6dbbb9b3",
    ),
)


def _matbench(name: str, entries: int, target: str, unit: str, sha256: str) -> PublishedSet:
    return PublishedSet(
        name=name,
        title=f"Matbench, {name}",
        version="0.1",
        entries=entries,
        reader="pandas_structures",
        files=(
            File(
                name=f"{name}.json.gz",
                url=f"https://ml.materialsproject.org/projects/{name}.json.gz",
                sha256=sha256,
            ),
        ),
        properties=(Property(name=target, key=target, unit=unit),),
        licence="Matbench, CC BY 4.0",
        citation=DUNN,
        caveat="for benchmark figures use crysldnet matbench, which keeps the official folds",
    )


PUBLISHED = {
    definition.name: definition
    for definition in (
        _jarvis(),
        _megnet(),
        _mp_20(),
        _gnome(),
        _oqmd(),
        _alexandria(),
        _lemat_bulk(),
        _mptrj(),
        _expt_kingsbury(),
        _expt_kim(),
        *(_matbench(*row) for row in _MATBENCH),
    )
}
"""Name to definition."""


def definition_of(name: str) -> PublishedSet:
    """Return a definition.

    Raises:
        DataError: there is none of this name.
    """
    if name not in PUBLISHED:
        close = get_close_matches(name, PUBLISHED, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"{name}: no such published data set; {hint}there are: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]
