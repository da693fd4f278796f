{{- /* Peers and rules of NetworkPolicies. */ -}}

{{- define "ep-serve.podPeer" -}}
- podSelector:
    matchLabels:
      {{- include "ep-serve.selector" . | nindent 6 }}
{{- end }}

{{- define "ep-serve.dnsEgress" -}}
- to:
    {{- toYaml .dns | nindent 4 }}
  ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end }}

{{- /* The public internet: not private ranges, not link-local ones, where clouds have their
       metadata service, and not what IPv6 maps to any of them. dict "ports" "policy". */ -}}
{{- define "ep-serve.internetEgress" -}}
{{- $four := list "0.0.0.0/8" "10.0.0.0/8" "100.64.0.0/10" "127.0.0.0/8" "169.254.0.0/16" "172.16.0.0/12" "192.0.0.0/24" "192.0.2.0/24" "192.168.0.0/16" "198.18.0.0/15" "198.51.100.0/24" "203.0.113.0/24" "224.0.0.0/4" "240.0.0.0/4" -}}
{{- $six := list "2001:db8::/32" "2002::/16" -}}
{{- range .policy.exceptNetworks -}}
{{- if contains ":" . -}}
{{- $six = append $six . -}}
{{- else -}}
{{- $four = append $four . -}}
{{- end -}}
{{- end -}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: {{ toJson $four }}
    # All that IPv6 has given out for public use; the rest is private, local or mapped.
    - ipBlock:
        cidr: 2000::/3
        except: {{ toJson $six }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end }}
