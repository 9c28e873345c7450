#!/usr/bin/env bash
# To be sourced: `read_flags FILE...` puts the flags of argument files into the array FLAGS.

# Take a flag and its values out of FLAGS.
drop_flag() {
  local kept=() word dropping=
  for word in "${FLAGS[@]}"; do
    if [[ $word == "$1" ]]; then
      dropping=1
    elif [[ $word == --* ]]; then
      dropping=
    fi
    [[ $dropping ]] || kept+=("$word")
  done
  FLAGS=("${kept[@]}")
}

# Append the flags of one file after another; a line `! --flag` takes away what came before.
read_flags() {
  local file line words word
  FLAGS=("${FLAGS[@]}")
  for file; do
    if [[ ! -r $file ]]; then
      echo "error: there is no readable file of flags $file" >&2
      return 2
    fi
    while IFS= read -r line || [[ $line ]]; do
      read -ra words <<<"${line%%#*}"
      if [[ ${words[0]-} == '!' ]]; then
        for word in "${words[@]:1}"; do drop_flag "$word"; done
      else
        FLAGS+=("${words[@]}")
      fi
    done <"$file"
  done
}

# The value of a flag in FLAGS, its last one.
flag_value() {
  local position value=
  for position in "${!FLAGS[@]}"; do
    [[ ${FLAGS[position]} == "$1" ]] && value=${FLAGS[position + 1]-}
  done
  printf '%s' "$value"
}
