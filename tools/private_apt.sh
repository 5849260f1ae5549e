# private_apt FOLDER ARGUMENT...: apt-get with its own lists, cache and sources (FOLDER/apt, FOLDER/apt/sources.list), which
# reads and writes nothing of the system's state and needs no root.  To be sourced.
private_apt() {
  local folder=$1
  shift
  mkdir -p "$folder"/apt/{lists,cache,cache/archives}/partial
  apt-get -qq \
    -o Dir::State="$folder/apt" -o Dir::State::Lists="$folder/apt/lists" -o Dir::State::Status=/dev/null \
    -o Dir::Cache="$folder/apt/cache" \
    -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o APT::Sandbox::User= \
    -o Acquire::Languages=none \
    -o APT::Update::Error-Mode=any \
    "$@"
}

# debian_archive COMPONENT: the address of the first archive among this machine's sources that has the component and is
# no security or update suite; nothing where there is none.
debian_archive() {
  apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v component="$1" '$3 == component && $2 !~ /-/ { print $1; exit }'
}
