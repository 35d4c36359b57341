# shellcheck shell=bash
# What the launchers share: one way to fail, one way to run a command, one look at the words meant
# for jaxalign. Sourced, never run.
# shellcheck disable=SC2034  # the variables are for the file that sources this one

if ((BASH_VERSINFO[0] < 5)); then
    echo "the launchers need bash 5, this is $BASH_VERSION; on macOS: brew install bash" >&2
    exit 2
fi

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PROGRAM="launch/$(basename "$0")"
MOUNT=/mnt/bucket # where a bucket appears on every machine
DRY_RUN=""

# A mistake in what was given: one sentence, exit code 2, as jaxalign itself does it.
die() {
    printf '%s: %s\n' "$PROGRAM" "$*" >&2
    exit 2
}

# Something outside went wrong: one sentence, exit code 1.
fail() {
    printf '%s: %s\n' "$PROGRAM" "$*" >&2
    exit 1
}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# Words as a shell would take them, quoted where they need it.
quoted() {
    local word
    for word in "$@"; do
        [[ $word =~ ^[-A-Za-z0-9_./:=@%+,]+$ ]] && printf ' %s' "$word" || printf ' %s' "${word@Q}"
    done
}

# Runs a command, or under --dry-run prints it.
run() {
    if [[ $DRY_RUN ]]; then
        printf '+%s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}

# Under --dry-run: says when the next command would run.
remark() { [[ -z $DRY_RUN ]] || printf '# %s\n' "$*"; }

needs_value() { [[ $2 -ge 2 ]] || die "$1 needs a value; see $PROGRAM --help"; }

needs_program() { [[ $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed; $2"; }

positive() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1: '$2' should be a whole number of 1 or more"; }

natural() { [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || die "$1: '$2' should be a whole number of 0 or more"; }

# Names become parts of machine, pod and file names: RFC 1123, with room for suffixes.
resource_name() {
    [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        die "$1: '$2' should be up to 40 of a-z, 0-9 and -, from a letter to a letter or digit"
}

# Reads the words after `--` into WORDS and finds their configuration file, if any: CONFIG, its
# place in WORDS CONFIG_AT.
read_words() {
    WORDS=("$@")
    CONFIG="" CONFIG_AT=""
    ((${#WORDS[@]})) || die "nothing to run: end with -- train CONFIG.yaml key=value ..."
    case ${WORDS[0]} in
        train | evaluate | generate | probe | merge | export | import | plan | data | config | demo) ;;
        *) die "'${WORDS[0]}' is no command of jaxalign; after -- comes train CONFIG.yaml, say" ;;
    esac
    local place word
    for place in "${!WORDS[@]}"; do
        word=${WORDS[place]}
        [[ $word != *$'\n'* ]] || die "a line break in '${word%%$'\n'*}...' cannot be sent on"
        [[ $word != output=*://* ]] || check_remote "${word#output=}"
        if [[ -z $CONFIG_AT && $word == *.y*ml && $word != *=* && $word != -* ]]; then
            CONFIG=$word CONFIG_AT=$place
        fi
    done
    case ${WORDS[0]} in
        train | evaluate | generate | config)
            [[ $CONFIG ]] || die "${WORDS[0]} needs a configuration file (.yaml)"
            ;;
    esac
    [[ -z $CONFIG || -f $CONFIG ]] || die "$CONFIG: no such file"
    local output
    output="$(yaml_output)"
    [[ $output != *://* ]] || has_output || check_remote "$output"
}

# A training writes to gs:// by itself; whatever else is refused by jaxalign, but on machines that
# cost money.
check_remote() {
    [[ $1 == gs://?*/?* ]] ||
        die "output=$1: name a folder, or gs://BUCKET/FOLDER of Google Cloud Storage"
    case ${WORDS[0]} in
        evaluate | generate)
            local word
            for word in "${WORDS[@]}"; do [[ $word != --out && $word != --out=* ]] || return 0; done
            die "output=$1: ${WORDS[0]} writes to folders only; give it --out FOLDER, or mount the" \
                "bucket (launch/tpu and launch/gke: --bucket)"
            ;;
    esac
}

has_output() {
    local word
    for word in "${WORDS[@]}"; do [[ $word != output=* ]] || return 0; done
    return 1
}

# `output` as the configuration file has it, without quotes and comment; empty where it has none.
yaml_output() {
    [[ $CONFIG ]] || return 0
    sed -n "s/^output:[[:space:]]*[\"']\{0,1\}\([^\"'#[:space:]]*\).*/\1/p" "$CONFIG" | tail -n 1
}

# Machines come and go, so results must lie on the bucket: sets `output` there where the words and
# the file name no absolute folder. $1: the run's name, $2: the bucket or nothing, $3: machines.
keep_results() {
    case ${WORDS[0]} in train | evaluate | generate) ;; *) return 0 ;; esac
    local output word
    output="$(yaml_output)"
    for word in "${WORDS[@]}"; do [[ $word != output=* ]] || output=${word#output=}; done
    [[ $output != /* && $output != gs://* ]] || return 0
    if [[ $2 ]]; then
        ! has_output || die "output=$output lies on the machine's own disk; name a folder in $MOUNT"
        WORDS+=("output=$MOUNT/$1")
    elif (($3 > 1)); then
        die "$3 machines need a folder that all of them see; give --bucket gs://NAME, or" \
            "output=/ABSOLUTE/FOLDER where they share one"
    else
        say "without --bucket the results lie on the machine's disk and go with it"
    fi
}

# gs://NAME, gs://NAME/ or NAME -> NAME.
bucket_name() {
    local name=${1#gs://}
    name=${name%/}
    [[ $name =~ ^[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]$ ]] || die "--bucket: '$1' is no bucket's name"
    printf '%s\n' "$name"
}
