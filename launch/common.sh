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
DRY_RUN="" WARNED=""

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

# Reads the options in OPTIONS: for each its variable, then a check of the value. `NAME+` is a list,
# `NAME+=` a list of option=value. Sets AFTER to the words that follow --.
read_options() {
    local entry value
    AFTER=()
    while (($#)); do
        case $1 in
            --) AFTER=("${@:2}"); return ;;
            --dry-run) DRY_RUN=yes; shift; continue ;;
            --help | -h) usage; exit 0 ;;
            --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        (($# > 1)) || die "$1 needs a value; see $PROGRAM --help"
        read -ra entry <<<"${1:+${OPTIONS[$1]:-}}"
        ((${#entry[@]})) ||
            die "unknown option $1; words for jaxalign come after --; see $PROGRAM --help"
        ((${#entry[@]} == 1)) || "${entry[1]}" "$1" "$2" "${entry[@]:2}"
        value=$2
        [[ ${entry[0]} != *= ]] || value=$1=$2
        if [[ ${entry[0]} == *+* ]]; then
            local -n list=${entry[0]%+*}
            list+=("$value")
        else
            printf -v "${entry[0]}" %s "$value"
        fi
        shift 2
    done
}

# $1: the command that was given; the rest: those that exist.
read_command() {
    case $1 in --help | -h | help) usage; exit 0 ;; esac
    among "$@" || die "unknown command '$1'; see $PROGRAM --help"
}

given() { [[ $2 ]] || die "$1 is missing${3:-}"; }

needs_program() { [[ $DRY_RUN ]] || command -v "$1" >/dev/null || die "$1 is not installed; $2"; }

positive() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1: '$2' should be a whole number of 1 or more"; }

natural() { [[ $2 =~ ^(0|[1-9][0-9]*)$ ]] || die "$1: '$2' should be a whole number of 0 or more"; }

numbers() { [[ $2 =~ ^[0-9]+(,[0-9]+)*$ ]] || die "$1: '$2' should be numbers, as in 0,1,3"; }

# Whether the first word is one of the others.
among() {
    local word
    for word in "${@:2}"; do [[ $1 != "$word" ]] || return 0; done
    return 1
}

# A value out of the words that follow it.
one_of() {
    local but_last
    ! among "${@:2}" || return 0
    printf -v but_last '%s, ' "${@:3:$#-3}"
    die "$1: '$2' should be ${but_last%, } or ${*: -1}"
}

# The check that follows it, where there is a value.
optional() { [[ -z $2 ]] || "$3" "$1" "$2" "${@:4}"; }

# Names become parts of machine, pod and file names: RFC 1123, with room for suffixes.
resource_name() {
    [[ $2 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        die "$1: '$2' should be up to 40 of a-z, 0-9 and -, from a letter to a letter or digit"
}

# Reads the words after `--` into WORDS and finds their configuration file, if any: CONFIG, its
# place in WORDS CONFIG_AT, and what it goes on from (`read_files`).
read_words() {
    WORDS=("$@")
    CONFIG="" CONFIG_AT="" FILES=() FILES_IN=""
    ((${#WORDS[@]})) || die "nothing to run: end with -- train CONFIG.yaml key=value ..."
    case ${WORDS[0]} in
        train | evaluate | generate | probe | merge | export | import | plan | data | config | demo | compare | prepare) ;;
        *) die "'${WORDS[0]}' is not a command of jaxalign; after -- write, for example, train CONFIG.yaml" ;;
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
    [[ -z $CONFIG ]] || read_files
    local output
    output="$(yaml_output)"
    [[ $output != *://* ]] || has_output || check_remote "$output"
}

# Fills FILES with CONFIG and the files that it goes on from (`extends`; `base` of a comparison),
# themselves included, and FILES_IN with the folder that holds them all.
read_files() {
    local place file other
    [[ -f $CONFIG ]] || die "$CONFIG: no such file"
    FILES=("$(absolute "$CONFIG")")
    FILES_IN=$(dirname "${FILES[0]}")
    for ((place = 0; place < ${#FILES[@]}; place++)); do
        file=${FILES[place]}
        while read -r other; do
            [[ $other == /* ]] || other=$(dirname "$file")/$other
            [[ -f $other ]] || die "$file goes on from $other: no such file"
            other=$(absolute "$other")
            among "$other" "${FILES[@]}" || FILES+=("$other")
        done < <(sed 's/#.*//' "$file" |
            grep -oE "(^|[ {,])(extends|base):[[:space:]]*[\"']?[^[:space:],}\"']+\.ya?ml" |
            sed "s/^.*:[[:space:]]*[\"']*//")
        while [[ $file != "${FILES_IN%/}"/* ]]; do FILES_IN=$(dirname "$FILES_IN"); done
    done
}

absolute() { printf '%s/%s' "$(cd "$(dirname "$1")" && pwd -P)" "$(basename "$1")"; }

# $1, of FILES, as seen from FILES_IN.
within() { printf '%s' "${1#"${FILES_IN%/}/"}"; }

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

# `output` as the configuration has it, without quotes and comment; empty where it has none. A
# comparison has its own; a file that goes on from another one has the other's where it names none.
yaml_output() {
    local file found=""
    for file in "${FILES[@]}"; do
        found=$(sed -n "s/^output:[[:space:]]*[\"']\{0,1\}\([^\"'#[:space:]]*\).*/\1/p" "$file" |
            tail -n 1)
        [[ ! $found && ${WORDS[0]} != compare ]] || break
    done
    printf '%s' "$found"
}

# Machines come and go, so results belong on the bucket: puts them there where the words and the
# file name no absolute place. $1: the run's name, $2: the bucket or nothing, $3: machines.
keep_results() {
    keep_option "$@"
    case ${WORDS[0]} in train | evaluate | generate) keep_output "$@" ;; esac
}

# The place that an option names, or that the command takes without it.
keep_option() {
    local option=--out place flag at="" before="" value=""
    [[ ${WORDS[0]} != plan ]] || option=--json
    for ((place = 1; place < ${#WORDS[@]}; place++)); do
        flag=${WORDS[place]%%=*}
        # jaxalign takes the beginning of an option for all of it.
        [[ $flag == --?* && $option == "$flag"* ]] || continue
        at=$place before=$flag=
        [[ ${WORDS[place]} == *=* ]] || at=$((place + 1)) before=""
        value=${WORDS[at]:-}
        value=${value#"$before"}
        [[ $value ]] || die "$option needs a value, the place to write"
    done
    if [[ ! $at ]]; then
        case ${WORDS[0]} in
            compare | demo | export | probe) ;;
            *) return 0 ;;
        esac
        # A comparison has a folder in its file, and an export goes beside its run.
        [[ ${WORDS[0]} != compare || $(yaml_output) != /* ]] || return 0
        [[ ${WORDS[0]} != export || ${WORDS[1]:-} != /* ]] || return 0
        at=${#WORDS[@]} before=--out= value=${WORDS[0]}
    fi
    [[ $value != *://* ]] ||
        die "$option: $value is in the cloud, where only train writes; name a folder"
    [[ $value != /* ]] || return 0
    if [[ $2 ]]; then
        [[ /$value/ != */../* ]] || die "$option: $value leaves $MOUNT/$1; name a place within it"
        WORDS[at]=$before$MOUNT/$1/$value
    else
        warn_of_loss
    fi
}

# The folder of a run: `output`.
keep_output() {
    local output word
    output="$(yaml_output)"
    for word in "${WORDS[@]}"; do [[ $word != output=* ]] || output=${word#output=}; done
    [[ $output != /* && $output != gs://* ]] || return 0
    if [[ $2 ]]; then
        ! has_output || die "output=$output is on the machine's own disk; name a folder in $MOUNT"
        WORDS+=("output=$MOUNT/$1")
    elif (($3 > 1)); then
        die "$3 machines need a folder that all of them see; give --bucket gs://NAME, or" \
            "output=/ABSOLUTE/FOLDER where they share one"
    else
        warn_of_loss
    fi
}

# Says it once.
warn_of_loss() {
    [[ $WARNED ]] || say "without --bucket the results are on the machine's disk and go with it"
    WARNED=yes
}

# gs://NAME, gs://NAME/ or NAME.
bucket() {
    [[ $(bucket_name "$2") =~ ^[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]$ ]] ||
        die "$1: '$2' is not the name of a bucket"
}

bucket_name() {
    local name=${1#gs://}
    printf '%s' "${name%/}"
}
