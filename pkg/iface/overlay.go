package iface

// Overlay tells whether a device has a name that flannel gives to its own.
func Overlay(name string) bool { return own.MatchString(name) }
